"""What a training run is told: a TOML file, checked before anything is done."""

import dataclasses
import os
import tomllib
import types
import typing
from typing import Any

from ..codec.config import SNACConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained on. Inputs are those of `snax extract`.

    Args:
        inputs: of the training.
        held_out: never trained on, but looked at while training: `evaluate` clips of it, each in whole.
        crop_seconds: of each example, rounded up to whole pad multiples of the codec. (SNAC: 0.8.)
        batch: examples a step, of all devices together.
        loudness: between these levels each example's clip is brought, in dB of the root mean square to full scale.
    """

    inputs: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    crop_seconds: float = 0.8
    batch: int = 16
    loudness: tuple[float, float] = (-30.0, -16.0)

    def crop_samples(self, config: SNACConfig) -> int:
        """The samples of an example."""
        return -(-round(self.crop_seconds * config.sampling_rate) // config.pad_multiple) * config.pad_multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, for the codec and for the discriminators alike. The defaults are the Descript Audio Codec's.

    Args:
        learning_rate: reached after `warmup_steps`, and from then on multiplied by `decay` in every step.
        clip: the norm of the codec's gradient at most.
        clip_discriminators: that of the discriminators.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    decay: float = 0.999996
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 0.01
    clip: float = 1e3
    clip_discriminators: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """The weight of each of `snax.train.losses`; 0 leaves it out. The defaults are the Descript Audio Codec's."""

    mel: float = 15.0
    stft: float = 0.0
    convergence: float = 0.0
    waveform: float = 0.0
    commitment: float = 0.25
    codebook: float = 1.0
    adversarial: float = 1.0
    feature: float = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminators:
    """The networks that judge, and when they begin to. The defaults are the Descript Audio Codec's.

    Args:
        begin: the step from which on they are trained and heard; before it the codec trains without.
        periods: of the discriminators of folded audio, in samples; none for none.
        period_widths: the channels of their layers.
        windows: of the discriminators of spectra, in samples; none for none.
        spectrum_width: the channels of their layers.
    """

    begin: int = 0
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_widths: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    windows: tuple[int, ...] = (2048, 1024, 512)
    spectrum_width: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A training run.

    Args:
        steps: how many.
        seed: of weights, crops, loudness, noise and restarts.
        model: the architecture; None where the run starts from a model.
        dtype: what encoder, decoder and discriminators compute in; parameters, quantizer and losses are float32.
        average: the decay of the moving average of the codec's weights, which is what is evaluated and written.
        restart: rows of a codebook that are chosen less than this fraction of their share become vectors of the batch;
            0 for never.
        discriminators: None for none.
        log: so many steps from one line of the log to the next.
        evaluate: so many steps from one evaluation of held-out clips to the next.
        checkpoint: so many steps from one checkpoint to the next.
    """

    steps: int
    data: Data
    model: SNACConfig | None = None
    seed: int = 0
    dtype: str = "float32"
    average: float = 0.999
    restart: float = 0.0
    optimizer: Optimizer = Optimizer()
    losses: Losses = Losses()
    discriminators: Discriminators | None = None
    log: int = 50
    evaluate: int = 2000
    checkpoint: int = 1000


class SettingsError(ValueError):
    """Settings of which no training can be made."""


def read(path: str | os.PathLike[str]) -> Settings:
    """The settings in a TOML file. Relative paths in it begin where the command is run.

    Raises:
        SettingsError: for what is no TOML, an unknown or missing field, or a value of another type or out of range.
    """
    with open(path, "rb") as file:
        try:
            table = tomllib.load(file)
        except (ValueError, RecursionError) as error:  # the second: of brackets in brackets beyond all measure
            raise SettingsError(f"{os.fspath(path)} can't be read as TOML: {error}") from None
    try:
        return from_dict(table)
    except ValueError as error:
        raise SettingsError(f"{os.fspath(path)}: {error}") from None


def from_dict(table: dict[str, Any]) -> Settings:
    """The settings in a parsed file; raises as `read`."""
    settings: Settings = _section(Settings, table, "")
    for name in ("steps", "log", "evaluate", "checkpoint"):
        _check(getattr(settings, name) > 0, name, getattr(settings, name), "at least 1")
    _check(settings.dtype in ("float32", "bfloat16"), "dtype", settings.dtype, "float32 or bfloat16")
    _check(0 <= settings.average < 1, "average", settings.average, "at least 0 and less than 1")
    _check(0 <= settings.restart < 1, "restart", settings.restart, "at least 0 and less than 1")
    data, optimizer = settings.data, settings.optimizer
    _check(len(data.inputs) > 0, "data.inputs", data.inputs, "at least one file, folder or pattern")
    _check(data.crop_seconds > 0, "data.crop_seconds", data.crop_seconds, "more than 0")
    _check(data.batch > 0, "data.batch", data.batch, "at least 1")
    low, high = data.loudness
    _check(low <= high <= 0, "data.loudness", data.loudness, "a lower and a higher level, neither above 0 dB")
    _check(optimizer.learning_rate > 0, "optimizer.learning_rate", optimizer.learning_rate, "more than 0")
    _check(0 < optimizer.decay <= 1, "optimizer.decay", optimizer.decay, "more than 0 and at most 1")
    betas = optimizer.betas
    _check(all(0 <= beta < 1 for beta in betas), "optimizer.betas", betas, "at least 0 and less than 1")
    for field in dataclasses.fields(settings.losses):
        weight = getattr(settings.losses, field.name)
        _check(weight >= 0, f"losses.{field.name}", weight, "at least 0")
    if (judges := settings.discriminators) is not None:
        for name in ("periods", "period_widths"):
            sizes = getattr(judges, name)
            _check(all(size > 0 for size in sizes), f"discriminators.{name}", sizes, "at least 1 each")
        layers = bool(judges.period_widths or not judges.periods)
        _check(layers, "discriminators.period_widths", judges.period_widths, "the channels of at least one layer")
        right = all(length > 0 and length % 4 == 0 for length in judges.windows)
        _check(right, "discriminators.windows", judges.windows, "positive multiples of 4")
        _check(judges.spectrum_width > 0, "discriminators.spectrum_width", judges.spectrum_width, "at least 1")
    return settings


def to_dict(settings: Settings) -> dict[str, Any]:
    """As JSON has it: equal for equal settings."""
    table = dataclasses.asdict(settings)
    if settings.model is not None:
        table["model"] = settings.model.to_dict()
    return _lists(table)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(each) for key, each in value.items()}
    return [_lists(each) for each in value] if isinstance(value, list | tuple) else value


def _check(right: bool, name: str, value: Any, expected: str) -> None:
    if not right:
        raise SettingsError(f"`{name}` (={value!r}) must be {expected}.")


def _section(kind: type, table: Any, where: str) -> Any:
    """A dataclass of a table, which must have its fields and no others."""
    if not isinstance(table, dict):
        raise SettingsError(f"`{where.rstrip('.')}` (={table!r}) must be a table.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(table) - set(fields)):
        raise SettingsError(f"unknown: {', '.join(where + name for name in unknown)}; known are {', '.join(fields)}.")
    for name, field in fields.items():
        if name not in table and field.default is dataclasses.MISSING:
            raise SettingsError(f"`{where}{name}` is missing.")
    types_of = typing.get_type_hints(kind)
    return kind(**{name: _value(types_of[name], value, where + name) for name, value in table.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    if isinstance(kind, types.UnionType):  # a section that may be left out
        kind = typing.get_args(kind)[0]
    if kind is SNACConfig:
        try:
            # TOML has no null: here attention is what one has to ask for.
            return SNACConfig.from_dict({"attn_window_size": None} | value if isinstance(value, dict) else value)
        except ValueError as error:
            raise SettingsError(f"`{name}`: {error}") from None
    if dataclasses.is_dataclass(kind):
        return _section(typing.cast(type, kind), value, name + ".")
    if typing.get_origin(kind) is tuple:
        each, *rest = typing.get_args(kind)
        length = len(rest) + 1 if rest != [...] else None
        if not isinstance(value, list) or length not in (None, len(value)):
            of_length = "" if length is None else f"{length} "
            raise SettingsError(f"`{name}` (={value!r}) must be a list of {of_length}{each.__name__}.")
        return tuple(_value(each, item, name) for item in value)
    if isinstance(value, int | float) and not abs(value) < 2**31:  # NaN is not either
        raise SettingsError(f"`{name}` (={value!r:.200}) must be a number below 2**31.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise SettingsError(f"`{name}` (={value!r}) must be {kind.__name__}.")
    return value
