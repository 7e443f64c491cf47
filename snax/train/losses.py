"""Training losses. SNAC's were not published. These are the ones of the Descript Audio Codec (Kumar et al., 2023,
arXiv:2306.06546), which SNAC's author says he followed, and the quantizer losses of an earlier version of SNAC.

Audio is (batch, 1, samples). Every loss is a mean over batch and time.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ..codec.quantizer import Quantized, ResidualVectorQuantize
from ..evaluate.spectra import FLOOR, MEL_SCALES, STFT_WINDOWS, magnitude, mel_filters, stft

# The outputs of a discriminator's layers. The last one is its decision.
Features = Sequence[Float[Array, "batch *_"]]


def mel_loss(
    audio: Float[Array, "batch 1 samples"],
    target: Float[Array, "batch 1 samples"],
    rate: int,
    scales: Sequence[tuple[int, int]] = MEL_SCALES,
) -> Float[Array, ""]:
    """Distance of the logarithmic mel spectra, in powers of ten, on several time scales (DAC, section 3.4)."""
    loss = jnp.zeros(())
    for window_length, bands in scales:
        filters = mel_filters(rate, window_length, bands)
        audio_mel, target_mel = (magnitude(stft(x, window_length)) @ filters for x in (audio, target))
        loss += _distance(_log10(audio_mel), _log10(target_mel))
    return loss


def stft_loss(
    audio: Float[Array, "batch 1 samples"],
    target: Float[Array, "batch 1 samples"],
    window_lengths: Sequence[int] = STFT_WINDOWS,
) -> Float[Array, ""]:
    """Distance of magnitudes, and of the logarithms of their squares (Engel et al., 2020, arXiv:2001.04643)."""
    loss = jnp.zeros(())
    for window_length in window_lengths:
        x, y = (magnitude(stft(signal, window_length)) for signal in (audio, target))
        loss += 2 * _distance(_log10(x), _log10(y)) + _distance(x, y)
    return loss


def spectral_convergence_loss(
    audio: Float[Array, "batch 1 samples"],
    target: Float[Array, "batch 1 samples"],
    window_lengths: Sequence[int] = STFT_WINDOWS,
) -> Float[Array, ""]:
    """Spectral convergence (Arik et al., 2018, arXiv:1808.06719): the Frobenius norm of the difference of magnitudes
    over that of the target's, by example. It weights loud peaks of speech more than losses of logarithms do.

    A norm of the target below 1 (about -70 dB) counts as 1.
    """
    loss = jnp.zeros(())
    for window_length in window_lengths:
        x, y = (magnitude(stft(signal, window_length)) for signal in (audio, target))
        distance, size = (jnp.sqrt(jnp.square(spectrum).sum((-2, -1)) + FLOOR) for spectrum in (x - y, y))
        loss += (distance / jnp.maximum(size, 1)).mean()
    return loss


def waveform_loss(audio: Float[Array, "batch 1 samples"], target: Float[Array, "batch 1 samples"]) -> Float[Array, ""]:
    """Mean absolute difference of the samples."""
    return _distance(audio, target)


def discriminator_loss(fake: Sequence[Features], real: Sequence[Features]) -> Float[Array, ""]:
    """Least-squares loss of the discriminators (Mao et al., 2017, arXiv:1611.04076): 1 for real audio, 0 for decoded.

    Args:
        fake: each discriminator's features of decoded audio, without a gradient to the codec.
        real: each discriminator's features of the original audio.
    """
    loss = jnp.zeros(())
    for fake_features, real_features in zip(fake, real, strict=True):
        loss += jnp.square(fake_features[-1]).mean() + jnp.square(1 - real_features[-1]).mean()
    return loss


def adversarial_loss(fake: Sequence[Features]) -> Float[Array, ""]:
    """Least-squares loss of the codec: 1 for decoded audio."""
    loss = jnp.zeros(())
    for features in fake:
        loss += jnp.square(1 - features[-1]).mean()
    return loss


def feature_matching_loss(fake: Sequence[Features], real: Sequence[Features]) -> Float[Array, ""]:
    """Mean absolute difference of the features of all layers but the last (Larsen et al., 2016, arXiv:1512.09300)."""
    loss = jnp.zeros(())
    for fake_features, real_features in zip(fake, real, strict=True):
        for a, b in zip(fake_features[:-1], real_features[:-1], strict=True):
            loss += _distance(a, lax.stop_gradient(b))
    return loss


def quantizer_losses(
    quantizer: ResidualVectorQuantize, quantized: Quantized
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Commitment and codebook loss (van den Oord et al., 2017, arXiv:1711.00937) of the quantizer's own results.

    The first moves the encoder to the chosen rows of the codebooks, the second moves these rows to the encoder. Both
    compare vectors that are not normalised: the mean over each level, summed over the levels.
    """
    commitment = codebook = jnp.zeros(())
    for level, codes, z_e in zip(quantizer.quantizers, quantized.codes, quantized.z_e, strict=True):
        rows = level.codebook[...][codes]
        commitment += jnp.square(z_e - lax.stop_gradient(rows)).mean()
        codebook += jnp.square(rows - lax.stop_gradient(z_e)).mean()
    return commitment, codebook


def _distance(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Mean absolute difference. Where there is none its gradient is 0, as torch has it; that of JAX's `abs` is 1, which
    would push every sample of digital silence the same way."""
    difference = a - b
    return (difference * lax.stop_gradient(jnp.sign(difference))).mean()


def _log10(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.log10(jnp.maximum(x, FLOOR))
