"""Configuration of a training run: a TOML file, which is validated before training starts."""

import dataclasses
import os
import tomllib
import types
import typing
from typing import Any

from ..codec.config import SNACConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Training data. Inputs are given as for `snax extract`.

    Args:
        inputs: the audio to train on.
        held_out: audio for evaluation only. The first clips of it are scored in each evaluation, in full length.
        crop_seconds: length of an example, rounded up to a multiple of the codec's pad multiple. (SNAC: 0.8.)
        batch: examples per step, over all devices.
        rms_db: the range of the random RMS level to which each example's clip is scaled, in dBFS.
    """

    inputs: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    crop_seconds: float = 0.8
    batch: int = 16
    rms_db: tuple[float, float] = (-30.0, -16.0)

    def crop_samples(self, model_config: SNACConfig) -> int:
        """The number of samples of an example."""
        samples, multiple = round(self.crop_seconds * model_config.sampling_rate), model_config.pad_multiple
        return -(-samples // multiple) * multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW, for the codec and for the discriminators alike. The defaults are the Descript Audio Codec's.

    Args:
        learning_rate: reached after `warmup_steps`, and from then on multiplied by `lr_decay` in every step.
        max_grad_norm: the global norm to which the codec's gradient is clipped.
        max_grad_norm_discriminators: the global norm to which the discriminators' gradient is clipped.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 0
    lr_decay: float = 0.999996
    betas: tuple[float, float] = (0.8, 0.99)
    weight_decay: float = 0.01
    max_grad_norm: float = 1e3
    max_grad_norm_discriminators: float = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """The weights of the losses in `snax.train.losses`. A weight of 0 leaves a loss out.

    The defaults are the Descript Audio Codec's.
    """

    mel: float = 15.0
    stft: float = 0.0
    spectral_convergence: float = 0.0
    waveform: float = 0.0
    commitment: float = 0.25
    codebook: float = 1.0
    adversarial: float = 1.0
    feature_matching: float = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discriminators:
    """The discriminators. The defaults are the Descript Audio Codec's.

    Args:
        start_step: the first step in which the discriminators are trained and used, counted from 0.
        periods: the periods of the period discriminators, in samples. May be empty.
        period_widths: the number of channels of each layer of a period discriminator.
        fft_sizes: the FFT sizes of the spectrum discriminators, in samples. May be empty.
        spectrum_width: the number of channels of each layer of a spectrum discriminator.
    """

    start_step: int = 0
    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    period_widths: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    fft_sizes: tuple[int, ...] = (2048, 1024, 512)
    spectrum_width: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Args:
        steps: the number of training steps.
        seed: the seed of initial weights, crops, RMS levels, noise and replaced codebook rows.
        model: the architecture. None if the run starts from an existing model.
        dtype: the dtype of computations in encoder, decoder and discriminators. Parameters, quantizer and losses are
            float32.
        ema_decay: the decay of the exponential moving average of the codec's weights. The averaged weights are the ones
            that are evaluated and saved.
        dead_code_threshold: codebook rows that are selected less than this fraction of an equal share are replaced by
            vectors of the batch. 0 disables it.
        discriminators: None to train without discriminators.
        log_every: number of steps between lines of the log.
        eval_every: number of steps between evaluations on held-out clips.
        checkpoint_every: number of steps between checkpoints.
    """

    steps: int
    data: Data
    model: SNACConfig | None = None
    seed: int = 0
    dtype: str = "float32"
    ema_decay: float = 0.999
    dead_code_threshold: float = 0.0
    optimizer: Optimizer = Optimizer()
    losses: Losses = Losses()
    discriminators: Discriminators | None = None
    log_every: int = 50
    eval_every: int = 2000
    checkpoint_every: int = 1000


class ConfigError(ValueError):
    """An invalid configuration."""


def read(path: str | os.PathLike[str]) -> TrainConfig:
    """Read a configuration from a TOML file. Relative paths in it are relative to the working directory.

    Raises:
        ConfigError: if the file is not valid TOML, a field is unknown or missing, or a value has another type or is out
            of range.
    """
    with open(path, "rb") as file:
        try:
            table = tomllib.load(file)
        except (ValueError, RecursionError) as error:  # the second: for deeply nested brackets
            raise ConfigError(f"{os.fspath(path)} can't be read as TOML: {error}") from None
    try:
        return from_dict(table)
    except ValueError as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from None


def from_dict(table: dict[str, Any]) -> TrainConfig:
    """Make a configuration from a parsed TOML file. Raises like `read`."""
    config: TrainConfig = _section(TrainConfig, table, "")
    for name in ("steps", "log_every", "eval_every", "checkpoint_every"):
        _check(getattr(config, name) > 0, name, getattr(config, name), "at least 1")
    _check(config.dtype in ("float32", "bfloat16"), "dtype", config.dtype, "float32 or bfloat16")
    _check(0 <= config.ema_decay < 1, "ema_decay", config.ema_decay, "at least 0 and less than 1")
    threshold = config.dead_code_threshold
    _check(0 <= threshold < 1, "dead_code_threshold", threshold, "at least 0 and less than 1")
    data, optimizer = config.data, config.optimizer
    _check(len(data.inputs) > 0, "data.inputs", data.inputs, "at least one file, folder or pattern")
    _check(data.crop_seconds > 0, "data.crop_seconds", data.crop_seconds, "more than 0")
    _check(data.batch > 0, "data.batch", data.batch, "at least 1")
    low, high = data.rms_db
    _check(low <= high <= 0, "data.rms_db", data.rms_db, "a lower and a higher level, neither above 0 dB")
    _check(optimizer.learning_rate > 0, "optimizer.learning_rate", optimizer.learning_rate, "more than 0")
    _check(0 < optimizer.lr_decay <= 1, "optimizer.lr_decay", optimizer.lr_decay, "more than 0 and at most 1")
    betas = optimizer.betas
    _check(all(0 <= beta < 1 for beta in betas), "optimizer.betas", betas, "at least 0 and less than 1")
    for field in dataclasses.fields(config.losses):
        weight = getattr(config.losses, field.name)
        _check(weight >= 0, f"losses.{field.name}", weight, "at least 0")
    if (discriminators := config.discriminators) is not None:
        for name in ("periods", "period_widths"):
            sizes = getattr(discriminators, name)
            _check(all(size > 0 for size in sizes), f"discriminators.{name}", sizes, "at least 1 each")
        widths, fft_sizes = discriminators.period_widths, discriminators.fft_sizes
        layers = bool(widths or not discriminators.periods)
        _check(layers, "discriminators.period_widths", widths, "the channels of at least one layer")
        valid = all(size > 0 and size % 4 == 0 for size in fft_sizes)
        _check(valid, "discriminators.fft_sizes", fft_sizes, "positive multiples of 4")
        width = discriminators.spectrum_width
        _check(width > 0, "discriminators.spectrum_width", width, "at least 1")
    return config


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Convert a configuration to a dictionary of JSON types. Equal configurations give equal dictionaries."""
    table = dataclasses.asdict(config)
    if config.model is not None:
        table["model"] = config.model.to_dict()
    return _lists(table)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _check(valid: bool, name: str, value: Any, expected: str) -> None:
    if not valid:
        raise ConfigError(f"`{name}` (={value!r}) must be {expected}.")


def _section(kind: type, table: Any, where: str) -> Any:
    """Make a dataclass from a table, which must have its fields and no others."""
    if not isinstance(table, dict):
        raise ConfigError(f"`{where.rstrip('.')}` (={table!r}) must be a table.")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(table) - set(fields)):
        raise ConfigError(f"unknown: {', '.join(where + name for name in unknown)}; known are {', '.join(fields)}.")
    for name, field in fields.items():
        if name not in table and field.default is dataclasses.MISSING:
            raise ConfigError(f"`{where}{name}` is missing.")
    types_of = typing.get_type_hints(kind)
    return kind(**{name: _value(types_of[name], value, where + name) for name, value in table.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    if isinstance(kind, types.UnionType):  # an optional section
        kind = typing.get_args(kind)[0]
    if kind is SNACConfig:
        try:
            # TOML has no null: in recipes the default is no attention.
            return SNACConfig.from_dict({"attn_window_size": None} | value if isinstance(value, dict) else value)
        except ValueError as error:
            raise ConfigError(f"`{name}`: {error}") from None
    if dataclasses.is_dataclass(kind):
        return _section(typing.cast(type, kind), value, name + ".")
    if typing.get_origin(kind) is tuple:
        item_type, *rest = typing.get_args(kind)
        length = len(rest) + 1 if rest != [...] else None
        if not isinstance(value, list) or length not in (None, len(value)):
            of_length = "" if length is None else f"{length} "
            raise ConfigError(f"`{name}` (={value!r}) must be a list of {of_length}{item_type.__name__}.")
        return tuple(_value(item_type, item, name) for item in value)
    if isinstance(value, int | float) and not abs(value) < 2**31:  # NaN is not either
        raise ConfigError(f"`{name}` (={value!r:.200}) must be a number below 2**31.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ConfigError(f"`{name}` (={value!r}) must be {kind.__name__}.")
    return value
