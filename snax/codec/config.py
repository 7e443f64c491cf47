"""What a SNAC is made of: the fields of the hub's `config.json`, checked, and all that follows from them."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

# The reference's `LocalMHA` fixes the head size: a width that attention works on must be a multiple of it.
HEAD_DIM = 64

# What a `config.json` may ask for, since it may be a stranger's: some twenty times the largest published model has. A
# model of a thousand million parameters takes 4 GB; what is encoded is at least one pad multiple of samples.
MAX_PARAMETERS, MAX_PAD_MULTIPLE, MAX_LEVELS, MAX_RATE = 10**9, 2**20, 32, 768_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SNACConfig:
    """Architecture of a SNAC; fields and defaults are those of the reference's constructor.

    Derived, all properties: `hop_length`, `pad_multiple` (samples), `frame_rate`, `code_rates` (Hz),
    `tokens_per_second`, `bitrate` (bit/s). Hashable, so it can be static under `jax.jit`.

    Raises:
        ValueError: if no SNAC can be built from the fields; names the field and says what it must be.
    """

    sampling_rate: int = 44100
    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (3, 3, 7, 7)
    latent_dim: int = 0  # 0, or the null of a config.json: `encoder_dim * 2 ** len(encoder_rates)`
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
                f"`latent_dim` (={self.latent_dim!r:.200}) must be the width that the encoder ends with, "
                f"`encoder_dim * 2 ** len(encoder_rates)` (={width}), or null."
            )
        object.__setattr__(self, "latent_dim", width)
        if 1 in self.decoder_rates:
            raise ValueError(f"`decoder_rates` (={self.decoder_rates}) must be at least 2 each.")
        if math.prod(self.decoder_rates) != self.hop_length:
            raise ValueError(
                f"`decoder_rates` (={self.decoder_rates}) must multiply to the product of `encoder_rates` "
                f"(={self.encoder_rates}), {self.hop_length}: else decoded audio is not at `sampling_rate`."
            )
        if self.decoder_dim < 2 ** len(self.decoder_rates):
            raise ValueError(
                f"`decoder_dim` (={self.decoder_dim}) is halved {len(self.decoder_rates)} times by `decoder_rates`: "
                f"it must be at least {2 ** len(self.decoder_rates)}."
            )
        if self.attn_window_size is not None:
            object.__setattr__(self, "attn_window_size", _positive_int("attn_window_size", self.attn_window_size))
            for field in ("latent_dim", "decoder_dim"):
                if getattr(self, field) % HEAD_DIM:
                    raise ValueError(
                        f"`{field}` (={getattr(self, field)}) must be a multiple of {HEAD_DIM}, the size of an "
                        "attention head, when `attn_window_size` is set."
                    )
        if self.pad_multiple > MAX_PAD_MULTIPLE:
            raise ValueError(
                f"`encoder_rates` (={self.encoder_rates}), `vq_strides` (={self.vq_strides}) and `attn_window_size` "
                f"(={self.attn_window_size}) make audio multiples of {self.pad_multiple} samples: it must be at most "
                f"{MAX_PAD_MULTIPLE}."
            )
        if (parameters := self._largest_parameters()) > MAX_PARAMETERS:
            raise ValueError(
                f"`encoder_dim` (={self.encoder_dim}), `decoder_dim` (={self.decoder_dim}), `codebook_size` "
                f"(={self.codebook_size}) and `codebook_dim` (={self.codebook_dim}) make at least {parameters} "
                f"parameters: it must be at most {MAX_PARAMETERS}."
            )
        if self._encoded_frames(self.pad_multiple) * self.hop_length != self.pad_multiple:
            raise ValueError(
                f"`encoder_rates` (={self.encoder_rates}): a rate of 1 adds a frame (kernel 2, padding 1), "
                "which the rates after it must be large enough to drop again."
            )

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.encoder_rates)

    @property
    def pad_multiple(self) -> int:
        """Samples that `encode` pads to a multiple of, so that every level and window has whole frames.

        The reference takes `vq_strides[0]` for all the strides: the same wherever it runs at all.
        """
        return self.hop_length * math.lcm(*self.vq_strides, self.attn_window_size or 1)

    @property
    def frame_rate(self) -> float:
        """Latent frames per second."""
        return self.sampling_rate / self.hop_length

    @property
    def code_rates(self) -> tuple[float, ...]:
        """Codes per second, level by level."""
        return tuple(self.frame_rate / stride for stride in self.vq_strides)

    @property
    def tokens_per_second(self) -> float:
        """Codes per second, all levels together."""
        return sum(self.code_rates)

    @property
    def bitrate(self) -> float:
        """Bits per second."""
        return self.tokens_per_second * math.log2(self.codebook_size)

    def _largest_parameters(self) -> int:
        """Those of all layers but biases, norms and what stands between one channel of audio and many."""
        sizes = [len(self.vq_strides) * self.codebook_dim * (2 * self.latent_dim + self.codebook_size)]
        residual = 3 * (1 if self.depthwise else 8)  # 1 x 1, and unless depthwise 7 x 1, three times a block
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
        """The configuration in a parsed `config.json`.

        Raises:
            ValueError: for a field that SNAC does not have, and as the constructor does.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"a configuration must be an object with the fields of a SNAC, got {fields!r:.200}.")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"not the configuration of a SNAC: unknown {unknown!r:.200}, known are {sorted(known)}.")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return cls(**arguments | {"latent_dim": fields.get("latent_dim") or 0})

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` has them: `from_dict`'s inverse, and the reference's keyword arguments."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def strided_length(length: int, stride: int) -> int:
    """Frames that the reference's strided convolution (kernel 2s, stride s, padding ceil(s / 2)) makes of `length`."""
    return (length + 2 * math.ceil(stride / 2) - 2 * stride) // stride + 1


def _positive_int(field: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if not 0 < number < 2**31 or isinstance(value, bool):
        raise ValueError(f"`{field}` (={value!r:.200}) must be a positive whole number below 2**31.")
    return number


def _positive_ints(field: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not 0 < len(values) <= MAX_LEVELS:
        raise ValueError(f"`{field}` (={values!r:.200}) must be a list of 1 to {MAX_LEVELS} positive whole numbers.")
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
