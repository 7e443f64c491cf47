"""Training losses.

SNAC's losses were not published. These are the losses of the Descript Audio Codec (Kumar et al., 2023,
arXiv:2306.06546), which SNAC's author states he followed, and the quantizer losses of an earlier version of SNAC.
Audio is (batch, 1, samples). Every loss is a mean over batch and time.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ..codec.quantizer import Quantized, ResidualVectorQuantize
from ..evaluate.spectra import FLOOR, MEL_SCALES, STFT_WINDOWS, magnitude, mel_filters, stft

# The outputs of all layers of a discriminator. The last output holds the logits.
Features = Sequence[Float[Array, "batch *_"]]


def mel_loss(
    audio: Float[Array, "batch 1 samples"],
    target: Float[Array, "batch 1 samples"],
    rate: int,
    scales: Sequence[tuple[int, int]] = MEL_SCALES,
) -> Float[Array, ""]:
    """Mean absolute difference of log10 mel spectra, summed over several window lengths (DAC, section 3.4).

    Args:
        audio: decoded audio.
        target: original audio.
        rate: the sampling rate, in Hz.
        scales: pairs of window length in samples and number of mel bands.
    """
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
    """Mean absolute difference of magnitudes and of log10 powers, summed over several window lengths.

    From Engel et al., 2020, arXiv:2001.04643.
    """
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
    """Spectral convergence (Arik et al., 2018, arXiv:1808.06719), summed over several window lengths.

    For each example, the Frobenius norm of the difference of magnitudes is divided by the norm of the target, which
    counts as at least 1 (about -70 dB). It gives more weight to loud peaks of speech than log-spectral losses do.
    """
    loss = jnp.zeros(())
    for window_length in window_lengths:
        x, y = (magnitude(stft(signal, window_length)) for signal in (audio, target))
        distance, norm = (jnp.sqrt(jnp.square(spectrum).sum((-2, -1)) + FLOOR) for spectrum in (x - y, y))
        loss += (distance / jnp.maximum(norm, 1)).mean()
    return loss


def waveform_loss(audio: Float[Array, "batch 1 samples"], target: Float[Array, "batch 1 samples"]) -> Float[Array, ""]:
    """Mean absolute difference of the samples."""
    return _distance(audio, target)


def discriminator_loss(fake: Sequence[Features], real: Sequence[Features]) -> Float[Array, ""]:
    """Least-squares loss of the discriminators (Mao et al., 2017, arXiv:1611.04076).

    The targets are 1 for original and 0 for decoded audio.

    Args:
        fake: the features of decoded audio, for each discriminator. This function does not stop their gradient.
        real: the features of the original audio, for each discriminator.
    """
    loss = jnp.zeros(())
    for fake_features, real_features in zip(fake, real, strict=True):
        loss += jnp.square(fake_features[-1]).mean() + jnp.square(1 - real_features[-1]).mean()
    return loss


def adversarial_loss(fake: Sequence[Features]) -> Float[Array, ""]:
    """Least-squares loss of the codec. The target is 1 for decoded audio."""
    loss = jnp.zeros(())
    for features in fake:
        loss += jnp.square(1 - features[-1]).mean()
    return loss


def feature_matching_loss(fake: Sequence[Features], real: Sequence[Features]) -> Float[Array, ""]:
    """Mean absolute difference of the features of all layers but the last (Larsen et al., 2016, arXiv:1512.09300).

    The differences are summed over layers and discriminators.
    """
    loss = jnp.zeros(())
    for fake_features, real_features in zip(fake, real, strict=True):
        for a, b in zip(fake_features[:-1], real_features[:-1], strict=True):
            loss += _distance(a, lax.stop_gradient(b))
    return loss


def quantizer_losses(
    quantizer: ResidualVectorQuantize, quantized: Quantized
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Commitment loss and codebook loss (van den Oord et al., 2017, arXiv:1711.00937), each summed over the levels.

    The commitment loss moves the encoder's outputs towards the selected codebook rows. The codebook loss moves these
    rows towards the encoder's outputs. Both compare vectors without normalization.

    Args:
        quantizer: the quantizer.
        quantized: the quantizer's results for the batch.

    Returns:
        (commitment loss, codebook loss).
    """
    commitment = codebook = jnp.zeros(())
    for level, codes, z_e in zip(quantizer.quantizers, quantized.codes, quantized.z_e, strict=True):
        rows = level.codebook[...][codes]
        commitment += jnp.square(z_e - lax.stop_gradient(rows)).mean()
        codebook += jnp.square(rows - lax.stop_gradient(z_e)).mean()
    return commitment, codebook


def _distance(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Mean absolute difference, with torch's gradient of 0 where the difference is 0. JAX's `abs` has a gradient of 1
    there, which would push all samples of digital silence in the same direction."""
    difference = a - b
    return (difference * lax.stop_gradient(jnp.sign(difference))).mean()


def _log10(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.log10(jnp.maximum(x, FLOOR))
