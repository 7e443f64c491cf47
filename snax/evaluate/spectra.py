"""Spectra for losses and metrics. They equal those of torch and librosa, with which the recipes were tuned."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Complex, Float

# The scales of the training losses: window lengths in samples, each with its number of mel bands.
MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
STFT_WINDOWS = (2048, 512)
# Magnitudes are clamped to this value before the logarithm, so that the losses ignore differences in near silence.
FLOOR = 1e-5


def stft(audio: Float[Array, "*batch samples"], window_length: int) -> Complex[Array, "*batch frames bins"]:
    """Return the short-time Fourier transform, as `torch.stft(..., center=True)` computes it.

    The window is a periodic Hann window and the hop is a quarter of it. Frame i is centered on sample i * hop. Both
    ends of the audio are padded by reflection.

    Args:
        audio: audio that is longer than half a window.
        window_length: window length in samples, a multiple of 4.
    """
    hop = window_length // 4
    mirrored = jnp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(window_length // 2,) * 2], mode="reflect")
    # Frames overlap by whole hops, so four shifted copies of the hops side by side form the frames.
    count = audio.shape[-1] // hop + 1
    hops = mirrored[..., : (count + 3) * hop].reshape(*audio.shape[:-1], count + 3, hop)
    frames = jnp.concatenate([hops[..., i : i + count, :] for i in range(4)], axis=-1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_length) / window_length)
    return jnp.fft.rfft(frames * window.astype(np.float32).reshape([1] * audio.ndim + [window_length]))


def magnitude(spectrum: Complex[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return absolute values. Their gradient at 0 is 0, as in torch. A plain `jnp.sqrt` would give NaN."""
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1)), 0)


@functools.cache
def mel_filters(rate: int, window_length: int, bands: int) -> Float[np.ndarray, "bins bands"]:
    """Return the transpose of `librosa.filters.mel`: triangular filters of equal area on Slaney's mel scale.

    Args:
        rate: sampling rate in Hz. The filters reach from 0 Hz to half of it.
        window_length: length of the spectrum's window in samples.
        bands: number of mel bands.
    """
    frequencies = np.linspace(0, rate / 2, window_length // 2 + 1)
    edges = _from_mel(np.linspace(0, _to_mel(rate / 2), bands + 2))
    low, center, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies[:, None] - low) / (center - low)
    falling = (high - frequencies[:, None]) / (high - center)
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)).astype(np.float32)


# Slaney's scale (Auditory Toolbox, 1998) is linear up to 1 kHz (15 mel). Above, each factor of 6.4 adds 27 mel.
def _to_mel(frequency: float) -> float:
    return frequency * 3 / 200 if frequency < 1000 else 15 + 27 * float(np.log(frequency / 1000) / np.log(6.4))


def _from_mel(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27))
