"""The model: encoder, decoder and `SNAC`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float, Int32, Integer, Key, PRNGKeyArray

from .attention import LocalMHA
from .compiled import compiled
from .config import SNACConfig
from .inputs import check_padding_mask, checked_audio, checked_codes, checked_latents
from .layers import (
    KERNEL_SIZE,
    Context,
    Conv,
    DecoderBlock,
    EncoderBlock,
    Layer,
    PaddingMask,
    Rngs,
    Sequential,
    Snake,
    Tanh,
    run,
)
from .noise import draw_noise
from .quantizer import ResidualVectorQuantize
from .tiling import map_tiles


class Encoder(Sequential):
    """Audio to latents."""

    def __init__(self, config: SNACConfig, *, rngs: Rngs):
        depthwise, channels = config.depthwise, config.encoder_dim
        self.conv_in = Conv(1, channels, KERNEL_SIZE, rngs=rngs)
        self.blocks: nnx.List[EncoderBlock] = nnx.List()
        for rate in config.encoder_rates:
            self.blocks.append(EncoderBlock(channels, 2 * channels, rate, depthwise=depthwise, rngs=rngs))
            channels *= 2
        window_size = config.attn_window_size
        self.attention = None if window_size is None else LocalMHA(channels, window_size, rngs=rngs)
        self.conv_out = Conv(channels, channels, KERNEL_SIZE, groups=channels if depthwise else 1, rngs=rngs)

    @property
    def layers(self) -> list[Layer]:
        attention = [] if self.attention is None else [self.attention]
        return [self.conv_in, *self.blocks, *attention, self.conv_out]

    def __call__(
        self, audio: Float[Array, "batch samples 1"], context: Context = Context()
    ) -> Float[Array, "batch frames channels"]:
        layers = self.layers
        last_block = len(self.blocks)  # its index, because `conv_in` comes first
        return run(layers[last_block:], map_tiles(layers[:last_block], audio, context), context)


class Decoder(Sequential):
    """Latents to audio."""

    def __init__(self, config: SNACConfig, *, rngs: Rngs):
        depthwise, channels, latent_dim = config.depthwise, config.decoder_dim, config.latent_dim
        if depthwise:
            self.conv_in = nnx.List(
                [
                    Conv(latent_dim, latent_dim, KERNEL_SIZE, groups=latent_dim, rngs=rngs),
                    Conv(latent_dim, channels, 1, rngs=rngs),
                ]
            )
        else:
            self.conv_in = nnx.List([Conv(latent_dim, channels, KERNEL_SIZE, rngs=rngs)])
        window_size = config.attn_window_size
        self.attention = None if window_size is None else LocalMHA(channels, window_size, rngs=rngs)
        self.blocks: nnx.List[DecoderBlock] = nnx.List()
        for i, rate in enumerate(config.decoder_rates):
            block = DecoderBlock(
                channels, channels // 2, rate, index=i, noise=config.noise, depthwise=depthwise, rngs=rngs
            )
            self.blocks.append(block)
            channels //= 2
        self.snake = Snake(channels, rngs=rngs)
        self.conv_out = Conv(channels, 1, KERNEL_SIZE, rngs=rngs)

    @property
    def layers(self) -> list[Layer]:
        attention = [] if self.attention is None else [self.attention]
        return [*self.conv_in, *attention, *self.blocks, self.snake, self.conv_out, TANH]

    def __call__(
        self, latents: Float[Array, "batch frames channels"], context: Context = Context()
    ) -> Float[Array, "batch samples 1"]:
        layers = self.layers
        second_block = layers.index(self.blocks[0]) + 1
        return map_tiles(layers[second_block:], run(layers[:second_block], latents, context), context)


TANH = Tanh()


class SNAC(nnx.Module):
    """The codec: mono audio <-> codes at several time scales, one array per level, coarse to fine.

    The model is a pytree. Its methods are compiled once per shape, and compose with `jit`, `vmap`, `grad` and
    shardings. They compute in the dtype of the parameters.

    Invalid input raises `ValueError`. Rank, channels and dtype are always checked. NaN, infinity and codes outside the
    codebook are checked only outside of `jit`, where values are known. Inside `jit`, codes are clamped to the codebook.

    For clips of different lengths in a batch, pass a `padding_mask`, (batch, latent frames), True where a frame belongs
    to a clip. Masked frames act as zero padding, so each clip gets the result it would get alone. Outputs at masked
    frames are undefined. Each clip must be zero-padded to a multiple of `config.pad_multiple` samples. To put several
    clips in one row, use `snax.encode_many` and `snax.decode_many`, which leave the required gaps.

    Args:
        config: the architecture.
        precision: the precision of matrix products, see `jax.default_matmul_precision`. TPUs and recent GPUs need
            "highest" for the reference's tokens, because their default rounds to bfloat16 or TF32.
        rngs: initializes the parameters with torch's distributions. None creates an abstract model, whose parameters
            are `jax.ShapeDtypeStruct`. For trained parameters use `snax.load`.

    Raises:
        ValueError: if `precision` is not one of JAX's matmul precisions.
    """

    def __init__(self, config: SNACConfig, *, precision: str = "highest", rngs: Rngs):
        with jax.default_matmul_precision(precision):  # raises ValueError if it is not valid
            pass
        self.config = config
        self.precision = precision
        self.encoder = Encoder(config, rngs=rngs)
        self.quantizer = ResidualVectorQuantize(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the parameters and of the computation."""
        return self.encoder.conv_in.kernel.dtype

    def encode(
        self,
        audio: Float[Array | np.ndarray, "batch 1 samples"],
        *,
        padding_mask: Bool[Array | np.ndarray, "batch frames"] | None = None,
    ) -> tuple[Int32[Array, "batch _"], ...]:
        """Encode audio to codes.

        Args:
            audio: (batch, 1, samples) at `config.sampling_rate`. Zero-padded to a multiple of `config.pad_multiple`.
            padding_mask: (batch, padded samples / hop_length), True where a latent frame belongs to a clip. Default:
                all frames.

        Returns:
            One array for each of `config.vq_strides`, (batch, padded samples / hop_length / stride), coarse to fine.

        Raises:
            ValueError: if `audio` or `padding_mask` is invalid.
        """
        with checked_audio(audio):
            padded = self._padded(audio)
            check_padding_mask(padding_mask, self.config, len(padded), padded.shape[-1] // self.config.hop_length)
            return self._encode(padded, padding_mask)

    def decode(
        self,
        codes: Sequence[Integer[Array | np.ndarray, "batch _"]],
        *,
        key: PRNGKeyArray | Key[Array, " batch"] | None = None,
        padding_mask: Bool[Array | np.ndarray, "batch frames"] | None = None,
    ) -> Float[Array, "batch 1 samples"]:
        """Decode codes to audio.

        Args:
            codes: one (batch, frames / stride) integer array for each of `config.vq_strides`, coarse to fine.
            key: the key of the noise that the reference adds in every call (if `config.noise`): one key for all rows or
                one per row, (batch,). Noise is a function of (key, frame index): identical whole, batched or streamed.
                Default: no noise.
            padding_mask: (batch, frames), True where a latent frame belongs to a clip. Default: all frames.

        Returns:
            (batch, 1, frames * hop_length). As in the reference, the padding of `encode` is not trimmed.

        Raises:
            ValueError: if `codes`, `key` or `padding_mask` is invalid.
        """
        with checked_codes(codes, self.config):
            frames = codes[0].shape[1] * self.config.vq_strides[0]
            check_padding_mask(padding_mask, self.config, len(codes[0]), frames)
            return self._decode(_int32(codes), key, padding_mask)

    def __call__(
        self,
        audio: Float[Array | np.ndarray, "batch 1 samples"],
        *,
        key: PRNGKeyArray | Key[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch 1 samples"], tuple[Int32[Array, "batch _"], ...]]:
        """Encode and decode audio. Differentiable, with a straight-through gradient for the codes.

        Args:
            audio: as in `encode`.
            key: as in `decode`.

        Returns:
            The reconstructed audio, trimmed to the length of the input, and the codes.

        Raises:
            ValueError: if `audio` or `key` is invalid.
        """
        with checked_audio(audio):
            reconstructed, codes = self._reconstruct(self._padded(audio), key)
            return reconstructed[..., : audio.shape[-1]], codes

    def audio_to_latents(
        self,
        audio: Float[Array | np.ndarray, "batch 1 samples"],
        *,
        padding_mask: Bool[Array | np.ndarray, "batch frames"] | None = None,
    ) -> Float[Array, "batch frames latent_dim"]:
        """Encode audio to latents. `audio` and `padding_mask` are those of `encode`."""
        with checked_audio(audio):
            padded = self._padded(audio)
            check_padding_mask(padding_mask, self.config, len(padded), padded.shape[-1] // self.config.hop_length)
            return self._audio_to_latents(padded, padding_mask)

    def quantize(
        self, latents: Float[Array | np.ndarray, "batch frames latent_dim"]
    ) -> tuple[Float[Array, "batch frames latent_dim"], tuple[Int32[Array, "batch _"], ...]]:
        """Quantize latents.

        Returns:
            The quantized latents, with a straight-through gradient, and the codes.

        Raises:
            ValueError: if `latents` is invalid, or its number of frames is not a multiple of each stride.
        """
        with checked_latents(latents, self.config):
            if any(latents.shape[1] % stride for stride in self.config.vq_strides):
                raise ValueError(
                    f"The number of frames of `latents` (={latents.shape[1]}) must be a multiple of each of "
                    f"`vq_strides` (={self.config.vq_strides})."
                )
            return self._quantize(jnp.asarray(latents, self.dtype))

    def dequantize(
        self, codes: Sequence[Integer[Array | np.ndarray, "batch _"]]
    ) -> Float[Array, "batch frames latent_dim"]:
        """Return the quantized latents of codes."""
        with checked_codes(codes, self.config):
            return self._dequantize(_int32(codes))

    def latents_to_audio(
        self,
        latents: Float[Array | np.ndarray, "batch frames latent_dim"],
        *,
        key: PRNGKeyArray | Key[Array, " batch"] | None = None,
        padding_mask: Bool[Array | np.ndarray, "batch frames"] | None = None,
    ) -> Float[Array, "batch 1 samples"]:
        """Decode latents to audio. `key` and `padding_mask` are those of `decode`."""
        with checked_latents(latents, self.config):
            check_padding_mask(padding_mask, self.config, *latents.shape[:2])
            return self._latents_to_audio(jnp.asarray(latents, self.dtype), key, padding_mask)

    @compiled
    def _audio_to_latents(self, audio: Array, padding_mask: PaddingMask = None) -> Array:
        return self.encoder(audio.swapaxes(1, 2), Context(padding_mask))

    @compiled
    def _quantize(self, latents: Array) -> tuple[Array, tuple[Array, ...]]:
        quantized = self.quantizer(latents)
        return quantized.z_q, quantized.codes

    @compiled
    def _dequantize(self, codes: tuple[Array, ...]) -> Array:
        return self.quantizer.dequantize(codes)

    @compiled
    def _latents_to_audio(
        self, latents: Array, key: Array | None, padding_mask: PaddingMask = None, positions: Array | None = None
    ) -> Array:
        noise = None
        if key is not None:
            positions = jnp.arange(latents.shape[1])[None] if positions is None else positions
            noise = draw_noise(self.config, key, positions)
            if len(noise[0]) not in (1, len(latents)):
                raise ValueError(
                    f"`key` must be one key, or one for each of the {len(latents)} rows, got {len(noise[0])} keys."
                )
        return self.decoder(latents, Context(padding_mask, noise)).swapaxes(1, 2)

    @compiled
    def _encode(self, audio: Array, padding_mask: PaddingMask = None) -> tuple[Array, ...]:
        return self._quantize(self._audio_to_latents(audio, padding_mask))[1]

    @compiled
    def _decode(
        self,
        codes: tuple[Array, ...],
        key: Array | None,
        padding_mask: PaddingMask = None,
        positions: Array | None = None,
    ) -> Array:
        return self._latents_to_audio(self._dequantize(codes), key, padding_mask, positions)

    @compiled
    def _reconstruct(self, audio: Array, key: Array | None) -> tuple[Array, tuple[Array, ...]]:
        quantized, codes = self._quantize(self._audio_to_latents(audio))
        return self._latents_to_audio(quantized, key), codes

    def _padded(self, audio: Array | np.ndarray) -> Array | np.ndarray:
        """Pad audio. Padding outside of `jit` lets lengths up to a pad multiple share one compilation."""
        padding = -audio.shape[-1] % self.config.pad_multiple
        if padding:
            pad = np.pad if isinstance(audio, np.ndarray) else jnp.pad
            audio = pad(audio, ((0, 0), (0, 0), (0, padding)))
        with np.errstate(over="ignore"):  # `checked_audio` reports a float64 beyond float32
            return audio if audio.dtype == self.dtype else audio.astype(self.dtype)


def _int32(codes: Sequence[Array | np.ndarray]) -> tuple[Array | np.ndarray, ...]:
    return tuple(level if level.dtype == np.int32 else level.astype(np.int32) for level in codes)
