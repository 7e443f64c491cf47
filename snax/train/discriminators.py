"""Discriminators of the Descript Audio Codec (Kumar et al., 2023, arXiv:2306.06546, section 3.3), without weight norm.

Arrays in the layers are (batch, height, width, channels).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float

from ..evaluate.spectra import stft

# Frequency bands with separate layers, as fractions of the Nyquist frequency.
BANDS = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


class Conv2d(nnx.Module):
    """Convolution over height and width. Both are padded by half of the kernel size on either side."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int], stride: tuple[int, int], *, rngs: nnx.Rngs
    ):
        self.stride, self.padding = stride, tuple((size // 2, size // 2) for size in kernel)
        bound = (in_channels * kernel[0] * kernel[1]) ** -0.5  # torch's default
        shape = (*kernel, in_channels, out_channels)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (out_channels,), minval=-bound, maxval=bound))

    def __call__(self, x: Float[Array, "batch height width _"]) -> Float[Array, "batch _ _ _"]:
        kernel = self.kernel[...]
        convolved = jax.lax.conv_general_dilated(
            x.astype(kernel.dtype), kernel, self.stride, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return convolved + self.bias[...][None, None, None]


def _apply_layers(
    x: Float[Array, "batch height width _"], layers: Sequence[Conv2d]
) -> list[Float[Array, "batch _ _ _"]]:
    """Apply the layers in order and return the outputs of all of them."""
    outputs = []
    for layer in layers:
        x = nnx.leaky_relu(layer(x), 0.1)
        outputs.append(x)
    return outputs


class PeriodDiscriminator(nnx.Module):
    """Discriminator of audio folded to rows of `period` samples (HiFi-GAN; Kong et al., 2020, arXiv:2010.05646)."""

    def __init__(self, period: int, widths: Sequence[int], *, rngs: nnx.Rngs):
        self.period = period
        sizes = zip((1, *widths), widths, strict=False)
        strides = [3] * (len(widths) - 1) + [1]
        self.layers = nnx.List(
            Conv2d(*size, (5, 1), (stride, 1), rngs=rngs) for size, stride in zip(sizes, strides, strict=True)
        )
        self.conv_post = Conv2d(widths[-1], 1, (3, 1), (1, 1), rngs=rngs)

    def __call__(self, audio: Float[Array, "batch samples"]) -> list[Float[Array, "batch _ _ _"]]:
        padding = self.period - audio.shape[1] % self.period  # a full period if divisible, as in DAC
        folded = jnp.pad(audio, ((0, 0), (0, padding)), mode="reflect").reshape(len(audio), -1, self.period, 1)
        outputs = _apply_layers(folded, self.layers)
        return [*outputs, self.conv_post(outputs[-1])]


class SpectrumDiscriminator(nnx.Module):
    """Discriminator of the complex spectrum, with separate layers for each frequency band."""

    def __init__(self, window_length: int, width: int, *, rngs: nnx.Rngs):
        self.window_length = window_length
        self.bands = nnx.List(
            nnx.List(
                [
                    Conv2d(2, width, (3, 9), (1, 1), rngs=rngs),
                    *(Conv2d(width, width, (3, 9), (1, 2), rngs=rngs) for _ in range(3)),
                    Conv2d(width, width, (3, 3), (1, 1), rngs=rngs),
                ]
            )
            for _ in BANDS
        )
        self.conv_post = Conv2d(width, 1, (3, 3), (1, 1), rngs=rngs)

    def __call__(self, audio: Float[Array, "batch samples"]) -> list[Float[Array, "batch _ _ _"]]:
        spectrum = self.spectrum(audio)
        parts = jnp.stack([spectrum.real, spectrum.imag], axis=-1)
        edges = (np.array(BANDS) * parts.shape[2]).astype(int)
        by_band = [
            _apply_layers(parts[:, :, low:high], layers) for (low, high), layers in zip(edges, self.bands, strict=True)
        ]
        logits = self.conv_post(jnp.concatenate([outputs[-1] for outputs in by_band], axis=2))
        return [*(output for outputs in by_band for output in outputs), logits]

    def spectrum(self, audio: Float[Array, "batch samples"]) -> Array:
        """Compute the STFT with DAC's padding: one frame per hop, and none centered on an end of the audio."""
        hop = self.window_length // 4
        padding = (self.window_length - hop) // 2
        to_full_hop = -audio.shape[1] % hop
        padded = jnp.pad(audio, ((0, 0), (padding, padding + to_full_hop)), mode="reflect")
        return stft(padded, self.window_length)[:, 2:-2]


class Discriminators(nnx.Module):
    """All discriminators. Each example is first normalized to mean 0 and a peak of 0.8.

    Args:
        periods, fft_sizes, period_widths, spectrum_width: see `snax.train.config.Discriminators`.
    """

    def __init__(
        self,
        periods: Sequence[int],
        fft_sizes: Sequence[int],
        period_widths: Sequence[int],
        spectrum_width: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.all = nnx.List(
            [
                *(PeriodDiscriminator(period, period_widths, rngs=rngs) for period in periods),
                *(SpectrumDiscriminator(fft_size, spectrum_width, rngs=rngs) for fft_size in fft_sizes),
            ]
        )

    def __call__(self, audio: Float[Array, "batch 1 samples"]) -> list[list[Float[Array, "batch _ _ _"]]]:
        """Return the outputs of all layers of each discriminator. The last output holds the logits."""
        centered = audio[:, 0] - audio[:, 0].mean(axis=1, keepdims=True)
        normalized = 0.8 * centered / (jnp.abs(centered).max(axis=1, keepdims=True) + 1e-9)
        return [discriminator(normalized) for discriminator in self.all]
