"""What training minimises. SNAC's author never published his; these are those of the Descript Audio Codec (Kumar et
al., 2023, arXiv:2306.06546), which he says he followed, and of SNAC's own quantizer before they were taken out of it.

Audio is (batch, 1, samples). Every loss is a mean, so that batch and length do not change its weight.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from ..codec.quantizer import Quantized, ResidualVectorQuantize
from ..evaluate.spectra import FLOOR, MEL_SCALES, STFT_WINDOWS, magnitude, mel_filters, stft

# The outputs of a discriminator's layers, the last of which is its judgement.
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
        ours, theirs = (magnitude(stft(x, window_length)) @ filters for x in (audio, target))
        loss += _distance(_log10(ours), _log10(theirs))
    return loss


def stft_loss(
    audio: Float[Array, "batch 1 samples"],
    target: Float[Array, "batch 1 samples"],
    window_lengths: Sequence[int] = STFT_WINDOWS,
) -> Float[Array, ""]:
    """Distance of magnitudes, and of the logarithms of their squares (Engel et al., 2020, arXiv:2001.04643)."""
    loss = jnp.zeros(())
    for window_length in window_lengths:
        ours, theirs = (magnitude(stft(x, window_length)) for x in (audio, target))
        loss += 2 * _distance(_log10(ours), _log10(theirs)) + _distance(ours, theirs)
    return loss


def convergence_loss(
    audio: Float[Array, "batch 1 samples"],
    target: Float[Array, "batch 1 samples"],
    window_lengths: Sequence[int] = STFT_WINDOWS,
) -> Float[Array, ""]:
    """Spectral convergence (Arik et al., 2018, arXiv:1808.06719): the distance of magnitudes over their size, both as
    Frobenius norms of an example. Logarithms count what is quiet as much; this is about the loud peaks of speech.

    A size below 1 counts as 1: of what is quieter than some -70 dB, the distance itself is taken.
    """
    loss = jnp.zeros(())
    for window_length in window_lengths:
        ours, theirs = (magnitude(stft(x, window_length)) for x in (audio, target))
        distance, size = (jnp.sqrt(jnp.square(x).sum((-2, -1)) + FLOOR) for x in (ours - theirs, theirs))
        loss += (distance / jnp.maximum(size, 1)).mean()
    return loss


def waveform_loss(audio: Float[Array, "batch 1 samples"], target: Float[Array, "batch 1 samples"]) -> Float[Array, ""]:
    """Mean absolute difference of the samples."""
    return _distance(audio, target)


def discriminator_loss(fake: Sequence[Features], real: Sequence[Features]) -> Float[Array, ""]:
    """What discriminators minimise (least squares, Mao et al., 2017, arXiv:1611.04076): 1 for real audio, 0 for ours.

    Args:
        fake: each discriminator's features of decoded audio, which must carry no gradient to the codec.
        real: those of the audio itself.
    """
    loss = jnp.zeros(())
    for ours, theirs in zip(fake, real, strict=True):
        loss += jnp.square(ours[-1]).mean() + jnp.square(1 - theirs[-1]).mean()
    return loss


def adversarial_loss(fake: Sequence[Features]) -> Float[Array, ""]:
    """What the codec minimises of that: discriminators should say 1 of what it decodes."""
    loss = jnp.zeros(())
    for ours in fake:
        loss += jnp.square(1 - ours[-1]).mean()
    return loss


def feature_loss(fake: Sequence[Features], real: Sequence[Features]) -> Float[Array, ""]:
    """Distance of what discriminators see in both, in all layers but the last (Larsen et al., 2016,
    arXiv:1512.09300)."""
    loss = jnp.zeros(())
    for ours, theirs in zip(fake, real, strict=True):
        for a, b in zip(ours[:-1], theirs[:-1], strict=True):
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
