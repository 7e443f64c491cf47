"""Encoder, decoder and the codec around them."""

import itertools
import operator
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
from .inputs import check_audio, check_codes, check_latents, check_padding_mask
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
        deep = len(self.blocks)  # from the last block on
        return run(layers[deep:], map_tiles(layers[:deep], audio, context), context)


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
        shallow = layers.index(self.blocks[0]) + 1  # after the first block
        return map_tiles(layers[shallow:], run(layers[:shallow], latents, context), context)


TANH = Tanh()


class SNAC(nnx.Module):
    """The codec: mono audio <-> codes of several time scales, one array a level, coarse to fine.

    A pytree. Its methods are compiled once per shape and compose with `jit`, `vmap`, `grad` and shardings. They compute
    in the dtype of the parameters. Matrix products have the given `precision`: TPUs and recent GPUs need "highest" for
    the reference's tokens, because their default rounds to bfloat16 or TF32.

    Bad input raises `ValueError`. Rank, channels and dtype are always checked; NaN, infinity and codes outside the
    codebook only outside of a `jit`, where values are known. Inside a `jit` such codes are clamped to the codebook.

    For clips of different lengths in a batch pass `padding_mask`, (batch, latent frames), True where a frame belongs to
    a clip. Masked frames act as zero padding, so each clip gets the result that it would get alone. Outputs at masked
    frames are undefined. Clips begin and end at multiples of `config.pad_multiple` samples, and audio is zero-padded to
    them. Several clips in one row need a gap between them: `snax.encode_many` and `snax.decode_many` take care of it.

    Args:
        config: the architecture.
        precision: one of JAX's matmul precisions, see `jax.default_matmul_precision`.
        rngs: initializes the parameters from torch's distributions. None makes an abstract model, whose parameters are
            `jax.ShapeDtypeStruct`. For trained parameters use `snax.load`.
    """

    def __init__(self, config: SNACConfig, *, precision: str = "highest", rngs: Rngs):
        with jax.default_matmul_precision(precision):  # raises ValueError for what is none
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
        """Encode audio at `config.sampling_rate`, zero-padded to a multiple of `config.pad_multiple` samples.

        Returns:
            One array for each of `config.vq_strides`, (batch, padded samples / hop_length / stride), coarse to fine.
        """
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
        """Decode codes to `hop_length` samples per latent frame, the padding of `encode` included.

        Args:
            key: for the noise that the reference adds on every call (if `config.noise`): one key per row, (batch,), or
                one for all rows. Noise is a function of (key, frame index): identical whole, batched or streamed.
                Without a key there is no noise.
        """
        checked = self._checked(codes)
        check_padding_mask(padding_mask, self.config, len(checked[0]), checked[0].shape[1] * self.config.vq_strides[0])
        return self._decode(checked, key, padding_mask)

    def __call__(
        self,
        audio: Float[Array | np.ndarray, "batch 1 samples"],
        *,
        key: PRNGKeyArray | Key[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch 1 samples"], tuple[Int32[Array, "batch _"], ...]]:
        """Encode and decode `audio`. Returns audio of the same length, and the codes.

        Differentiable: the gradient passes straight through the codes.
        """
        reconstructed, codes = self._reconstruct(self._padded(audio), key)
        return reconstructed[..., : audio.shape[-1]], codes

    def audio_to_latents(
        self,
        audio: Float[Array | np.ndarray, "batch 1 samples"],
        *,
        padding_mask: Bool[Array | np.ndarray, "batch frames"] | None = None,
    ) -> Float[Array, "batch frames latent_dim"]:
        """Latents of `audio`, which is padded as by `encode`."""
        padded = self._padded(audio)
        check_padding_mask(padding_mask, self.config, len(padded), padded.shape[-1] // self.config.hop_length)
        return self._audio_to_latents(padded, padding_mask)

    def quantize(
        self, latents: Float[Array | np.ndarray, "batch frames latent_dim"]
    ) -> tuple[Float[Array, "batch frames latent_dim"], tuple[Int32[Array, "batch _"], ...]]:
        """Quantize latents. Returns the quantized latents, with a straight-through gradient, and their codes."""
        check_latents(latents, self.config)
        if any(latents.shape[1] % stride for stride in self.config.vq_strides):
            raise ValueError(
                f"latents have {latents.shape[1]} frames, not a multiple of all of {self.config.vq_strides}."
            )
        return self._quantize(jnp.asarray(latents, self.dtype))

    def dequantize(
        self, codes: Sequence[Integer[Array | np.ndarray, "batch _"]]
    ) -> Float[Array, "batch frames latent_dim"]:
        """Latents of codes."""
        return self._dequantize(self._checked(codes))

    def latents_to_audio(
        self,
        latents: Float[Array | np.ndarray, "batch frames latent_dim"],
        *,
        key: PRNGKeyArray | Key[Array, " batch"] | None = None,
        padding_mask: Bool[Array | np.ndarray, "batch frames"] | None = None,
    ) -> Float[Array, "batch 1 samples"]:
        """Decode latents to audio. `key` is as in `decode`."""
        check_latents(latents, self.config)
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
                raise ValueError(f"key must be one, or one for each of {len(latents)} rows, got {len(noise[0])}.")
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
        """Check and pad audio before `jit`, so that all lengths up to a pad multiple share one compilation."""
        check_audio(audio)
        padding = -audio.shape[-1] % self.config.pad_multiple
        if padding:
            pad = np.pad if isinstance(audio, np.ndarray) else jnp.pad
            audio = pad(audio, ((0, 0), (0, 0), (0, padding)))
        return audio if audio.dtype == self.dtype else audio.astype(self.dtype)

    def _checked(self, codes: Sequence[Array | np.ndarray]) -> tuple[Array | np.ndarray, ...]:
        check_codes(codes, self.config)
        return tuple(level if level.dtype == np.int32 else level.astype(np.int32) for level in codes)


def draw_noise(
    config: SNACConfig, key: PRNGKeyArray | Key[Array, " batch"], positions: Int32[Array, "_ frames"]
) -> tuple[Float[Array, "_ _"], ...]:
    """Standard normal values for the time steps of each decoder block, (rows, steps).

    They are a function of a key, one for all rows or one for each, and of the latent frame's position in its clip.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    fold_each = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    per_row = 0 if key.ndim else None
    if per_row == 0 and len(positions) == 1:
        positions = jnp.broadcast_to(positions, (len(key), positions.shape[1]))
    keys = jax.vmap(fold_each, in_axes=(per_row, 0))(key, positions)

    def draw(block: int, samples: int) -> Array:
        normal = jax.vmap(jax.vmap(lambda frame: jax.random.normal(jax.random.fold_in(frame, block), (samples,))))
        return normal(keys).reshape(len(positions), -1)

    samples_per_frame = itertools.accumulate(config.decoder_rates, operator.mul)
    return tuple(draw(block, samples) for block, samples in enumerate(samples_per_frame))
