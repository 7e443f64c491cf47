"""Model configuration: the fields of the hub's `config.json`, validated, and the properties derived from them."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

# Fixed by the reference's `LocalMHA`. The width of an attention layer must be a multiple of it.
HEAD_DIM = 64

# Limits for a `config.json` from an untrusted source, about twenty times the largest published model. 10**9 parameters
# take 4 GB in float32. The pad multiple is limited because every input is padded to at least one.
MAX_PARAMETERS, MAX_PAD_MULTIPLE, MAX_LEVELS, MAX_RATE = 10**9, 2**20, 32, 768_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SNACConfig:
    """Architecture of a SNAC, with the fields and defaults of the reference's constructor.

    Hashable, so it can be a static argument of `jax.jit`.

    Raises:
        ValueError: if a field is invalid. The message names the field and the expected value.
    """

    sampling_rate: int = 44100
    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (3, 3, 7, 7)
    latent_dim: int = 0  # 0 (null in a config.json): `encoder_dim * 2 ** len(encoder_rates)`
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (7, 7, 3, 3)
    attn_window_size: int | None = 32
    codebook_size: int = 4096
    codebook_dim: int = 8
    vq_strides: tuple[int, ...] = (8, 4, 2, 1)
    noise: bool = True
    depthwise: bool = True

    def __post_init__(self) -> None:
        for field in ("encoder_rates", "decoder_rates", "vq_strides"):
            object.__setattr__(self, field, _positive_ints(field, getattr(self, field)))
        for field in ("sampling_rate", "encoder_dim", "decoder_dim", "codebook_size", "codebook_dim"):
            object.__setattr__(self, field, _positive_int(field, getattr(self, field)))
        for field in ("noise", "depthwise"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"`{field}` (={getattr(self, field)!r:.200}) must be true or false.")

        if self.sampling_rate > MAX_RATE:
            raise ValueError(f"`sampling_rate` (={self.sampling_rate}) must be at most {MAX_RATE} Hz.")
        width = self.encoder_dim * 2 ** len(self.encoder_rates)
        if self.latent_dim not in (0, width):
            raise ValueError(
                f"`latent_dim` (={self.latent_dim!r:.200}) must be the width of the encoder's output, "
                f"`encoder_dim * 2 ** len(encoder_rates)` (={width}), or null."
            )
        object.__setattr__(self, "latent_dim", width)
        if 1 in self.decoder_rates:
            raise ValueError(f"`decoder_rates` (={self.decoder_rates}) must each be at least 2.")
        if math.prod(self.decoder_rates) != self.hop_length:
            raise ValueError(
                f"`decoder_rates` (={self.decoder_rates}) must have the same product as `encoder_rates` "
                f"(={self.encoder_rates}), {self.hop_length}. Otherwise decoded audio is not at `sampling_rate`."
            )
        if self.decoder_dim < 2 ** len(self.decoder_rates):
            raise ValueError(
                f"`decoder_dim` (={self.decoder_dim}) must be at least {2 ** len(self.decoder_rates)}, because each "
                f"of the {len(self.decoder_rates)} `decoder_rates` halves it."
            )
        if self.attn_window_size is not None:
            object.__setattr__(self, "attn_window_size", _positive_int("attn_window_size", self.attn_window_size))
            for field in ("latent_dim", "decoder_dim"):
                if getattr(self, field) % HEAD_DIM:
                    raise ValueError(
                        f"`{field}` (={getattr(self, field)}) must be a multiple of {HEAD_DIM}, the size of an "
                        "attention head, if `attn_window_size` is set."
                    )
        if self.pad_multiple > MAX_PAD_MULTIPLE:
            raise ValueError(
                f"`encoder_rates` (={self.encoder_rates}), `vq_strides` (={self.vq_strides}) and `attn_window_size` "
                f"(={self.attn_window_size}) give a `pad_multiple` of {self.pad_multiple} samples. It must be at most "
                f"{MAX_PAD_MULTIPLE}."
            )
        if (parameters := self._parameters_lower_bound()) > MAX_PARAMETERS:
            raise ValueError(
                f"`encoder_dim` (={self.encoder_dim}), `decoder_dim` (={self.decoder_dim}), `codebook_size` "
                f"(={self.codebook_size}) and `codebook_dim` (={self.codebook_dim}) give at least {parameters} "
                f"parameters. A model must have at most {MAX_PARAMETERS}."
            )
        if self._encoded_frames(self.pad_multiple) * self.hop_length != self.pad_multiple:
            raise ValueError(
                f"`encoder_rates` (={self.encoder_rates}) have a rate of 1, which adds a frame (kernel 2, padding 1). "
                "The rates after it must be large enough to drop this frame."
            )

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.encoder_rates)

    @property
    def pad_multiple(self) -> int:
        """Samples. `encode` pads audio to a multiple of it, so that every level and attention window is complete.

        The reference uses `vq_strides[0]` in place of all strides. The result is the same for every configuration that
        the reference can run.
        """
        return self.hop_length * math.lcm(*self.vq_strides, self.attn_window_size or 1)

    @property
    def frame_rate(self) -> float:
        """Latent frames per second."""
        return self.sampling_rate / self.hop_length

    @property
    def code_rates(self) -> tuple[float, ...]:
        """Codes per second of each level."""
        return tuple(self.frame_rate / stride for stride in self.vq_strides)

    @property
    def tokens_per_second(self) -> float:
        """Codes per second of all levels together."""
        return sum(self.code_rates)

    @property
    def bitrate(self) -> float:
        """Bits per second."""
        return self.tokens_per_second * math.log2(self.codebook_size)

    def _parameters_lower_bound(self) -> int:
        """Return the number of parameters, except for those of small arrays such as biases and norms."""
        sizes = [len(self.vq_strides) * self.codebook_dim * (2 * self.latent_dim + self.codebook_size)]
        residual = 3 * (1 if self.depthwise else 8)  # per block: three pointwise and, unless depthwise, three 7 x 1
        for i, rate in enumerate(self.encoder_rates):
            width = self.encoder_dim * 2**i
            sizes.append(width**2 * (4 * rate + residual))
        for i, rate in enumerate(self.decoder_rates):
            width = self.decoder_dim // 2**i
            sizes.append(width**2 * rate + (width // 2) ** 2 * residual)
        sizes.append(self.latent_dim * self.decoder_dim * (1 if self.depthwise else 7))
        sizes.append(0 if self.depthwise else 7 * self.latent_dim**2)
        if self.attn_window_size is not None:
            sizes.append(4 * (self.latent_dim**2 + self.decoder_dim**2))
        return sum(sizes)

    def _encoded_frames(self, samples: int) -> int:
        for rate in self.encoder_rates:
            samples = strided_length(samples, rate)
        return samples

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "SNACConfig":
        """Create a configuration from the fields of a `config.json`.

        Raises:
            ValueError: if a field is unknown or invalid.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"A configuration must be an object with the fields of `SNACConfig`, got {fields!r:.200}.")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"unknown fields {unknown!r:.200}: a SNAC configuration has {sorted(known)}.")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**arguments | {"latent_dim": fields.get("latent_dim") or 0})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of `config.json`, which are the reference's keyword arguments. Inverse of `from_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def strided_length(length: int, stride: int) -> int:
    """Return the output length of the reference's strided convolution (kernel 2s, stride s, padding ceil(s / 2))."""
    return (length + 2 * math.ceil(stride / 2) - 2 * stride) // stride + 1


def _positive_int(field: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if not 0 < number < 2**31 or isinstance(value, bool):
        raise ValueError(f"`{field}` (={value!r:.200}) must be a positive integer below 2**31.")
    return number


def _positive_ints(field: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not 0 < len(values) <= MAX_LEVELS:
        raise ValueError(f"`{field}` (={values!r:.200}) must be a list of 1 to {MAX_LEVELS} positive integers.")
    return tuple(_positive_int(field, value) for value in values)


PUBLISHED_CONFIGS = {
    "snac_24khz": SNACConfig(
        sampling_rate=24000,
        encoder_dim=48,
        encoder_rates=(2, 4, 8, 8),
        decoder_dim=1024,
        decoder_rates=(8, 8, 4, 2),
        attn_window_size=None,
        vq_strides=(4, 2, 1),
    ),
    "snac_32khz": SNACConfig(sampling_rate=32000, encoder_rates=(2, 3, 8, 8), decoder_rates=(8, 8, 3, 2)),
    "snac_44khz": SNACConfig(sampling_rate=44100, encoder_rates=(2, 3, 8, 8), decoder_rates=(8, 8, 3, 2)),
}
"""The three published architectures, for models without weights: `SNAC(PUBLISHED_CONFIGS[name], rngs=...)`."""
