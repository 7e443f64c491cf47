"""Configuration of a training run: a TOML file, which is validated before training starts."""

import dataclasses
import os
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, ConfigDict, Field, PlainSerializer, PlainValidator, Strict, TypeAdapter
from pydantic.dataclasses import dataclass

from ..codec.config import SNACConfig
from ..config_errors import describe

# Numbers stay below 2**31, which float32 and int32 can represent.
Count = Annotated[int, Strict(), Field(ge=1, lt=2**31)]
Index = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
Positive = Annotated[float, Strict(), Field(gt=0, lt=2**31)]
Weight = Annotated[float, Strict(), Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Strict(), Field(ge=0, lt=1)]
Decibels = Annotated[float, Strict(), Field(gt=-(2**31), le=0)]


def _range(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the first level must not exceed the second, got {value}.")
    return value


def _model(value: Any) -> SNACConfig:
    if isinstance(value, SNACConfig):
        return value
    # TOML has no null, so a recipe without `attn_window_size` has no attention.
    return SNACConfig.from_dict({"attn_window_size": None} | value if isinstance(value, dict) else value)


_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Data:
    """Training data. Inputs are given as for `snax extract`.

    Args:
        inputs: the audio to train on.
        held_out: audio for evaluation only. The first clips of it are scored in each evaluation, in full length.
        crop_seconds: length of an example, rounded up to a multiple of the codec's pad multiple. (SNAC: 0.8.)
        batch: examples per step, over all devices.
        rms_db: the range of the random RMS level to which each example's clip is scaled, in dBFS.
    """

    inputs: Annotated[tuple[str, ...], Field(min_length=1)]
    held_out: tuple[str, ...] = ()
    crop_seconds: Positive = 0.8
    batch: Count = 16
    rms_db: Annotated[tuple[Decibels, Decibels], AfterValidator(_range)] = (-30.0, -16.0)

    def crop_samples(self, model_config: SNACConfig) -> int:
        """The number of samples of an example."""
        samples, multiple = round(self.crop_seconds * model_config.sampling_rate), model_config.pad_multiple
        return -(-samples // multiple) * multiple


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Optimizer:
    """AdamW, for the codec and for the discriminators alike. The defaults are the Descript Audio Codec's.

    Args:
        learning_rate: reached after `warmup_steps`, and from then on multiplied by `lr_decay` in every step.
        max_grad_norm: the global norm to which the codec's gradient is clipped.
        max_grad_norm_discriminators: the global norm to which the discriminators' gradient is clipped.
    """

    learning_rate: Positive = 1e-4
    warmup_steps: Index = 0
    lr_decay: Annotated[float, Strict(), Field(gt=0, le=1)] = 0.999996
    betas: tuple[Fraction, Fraction] = (0.8, 0.99)
    weight_decay: Weight = 0.01
    max_grad_norm: Positive = 1e3
    max_grad_norm_discriminators: Positive = 10.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Losses:
    """The weights of the losses in `snax.train.losses`. A weight of 0 leaves a loss out.

    The defaults are the Descript Audio Codec's.
    """

    mel: Weight = 15.0
    stft: Weight = 0.0
    spectral_convergence: Weight = 0.0
    waveform: Weight = 0.0
    commitment: Weight = 0.25
    codebook: Weight = 1.0
    adversarial: Weight = 1.0
    feature_matching: Weight = 2.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Discriminators:
    """The discriminators. The defaults are the Descript Audio Codec's.

    Args:
        start_step: the first step in which the discriminators are trained and used, counted from 0.
        periods: the periods of the period discriminators, in samples. May be empty.
        period_widths: the number of channels of each layer of a period discriminator.
        fft_sizes: the FFT sizes of the spectrum discriminators, in samples. May be empty.
        spectrum_width: the number of channels of each layer of a spectrum discriminator.
    """

    start_step: Index = 0
    periods: tuple[Count, ...] = (2, 3, 5, 7, 11)
    period_widths: Annotated[tuple[Count, ...], Field(min_length=1)] = (32, 128, 512, 1024, 1024)
    fft_sizes: tuple[Annotated[Count, Field(multiple_of=4)], ...] = (2048, 1024, 512)
    spectrum_width: Count = 32


@dataclass(frozen=True, kw_only=True, config=_STRICT)
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

    steps: Count
    data: Data
    model: Annotated[SNACConfig, PlainValidator(_model), PlainSerializer(SNACConfig.to_dict)] | None = None
    seed: Index = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    ema_decay: Fraction = 0.999
    dead_code_threshold: Fraction = 0.0
    optimizer: Optimizer = Optimizer()
    losses: Losses = Losses()
    discriminators: Discriminators | None = None
    log_every: Count = 50
    eval_every: Count = 2000
    checkpoint_every: Count = 1000


# Fields that do not change the trained weights, so that a run can be resumed with other values.
FREE_FIELDS = ("steps", "log_every", "eval_every", "checkpoint_every")

_ADAPTER = TypeAdapter(TrainConfig)


class ConfigError(ValueError):
    """An invalid configuration."""


def read(path: str | os.PathLike[str]) -> TrainConfig:
    """Read a configuration from a TOML file. Relative paths in it are relative to the working directory.

    Raises:
        ConfigError: if the file is not valid TOML, a field is unknown or missing, or a value has another type or is out
            of range. The message names all problems.
    """
    with open(path, "rb") as file:
        try:
            table = tomllib.load(file)
        except (ValueError, RecursionError) as error:  # RecursionError: deeply nested brackets
            raise ConfigError(f"{os.fspath(path)} cannot be read as TOML: {error}") from None
    try:
        return from_dict(table)
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from None


def from_dict(table: dict[str, Any]) -> TrainConfig:
    """Make a configuration from a parsed TOML file. Raises like `read`."""
    try:
        return _ADAPTER.validate_python(table)
    except pydantic.ValidationError as error:
        raise ConfigError(describe(error, _field_names(TrainConfig))) from None


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Convert a configuration to a dictionary of JSON types. Equal configurations give equal dictionaries."""
    table: dict[str, Any] = _ADAPTER.dump_python(config, mode="json")
    return table


def _field_names(section: type, prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields."""
    sections = {"data": Data, "optimizer": Optimizer, "losses": Losses, "discriminators": Discriminators}
    for field in dataclasses.fields(section):
        yield prefix + field.name
        if field.name in sections:
            yield from _field_names(sections[field.name], f"{field.name}.")
