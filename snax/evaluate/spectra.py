"""Spectra as training sees them: those of torch and librosa, since the recipes were tuned with them."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Complex, Float

# Window lengths in samples and mel bands of each, of the codec's training.
MEL_SCALES = ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320))
STFT_WINDOWS = (2048, 512)
# Below it, magnitudes are all alike to the logarithm: silence is not to be imitated to the last digit.
FLOOR = 1e-5


def stft(audio: Float[Array, "*batch samples"], window_length: int) -> Complex[Array, "*batch frames bins"]:
    """The spectrum under a periodic Hann window, a quarter of a window apart, that of frame i around sample i * hop.

    That is `torch.stft(..., center=True)`: both ends are mirrored. `window_length` must be a multiple of 4, and the
    audio longer than half of it.
    """
    hop = window_length // 4
    mirrored = jnp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(window_length // 2,) * 2], mode="reflect")
    # Frames overlap by whole hops: four shifted copies of the audio's hops, side by side.
    count = audio.shape[-1] // hop + 1
    hops = mirrored[..., : (count + 3) * hop].reshape(*audio.shape[:-1], count + 3, hop)
    frames = jnp.concatenate([hops[..., i : i + count, :] for i in range(4)], axis=-1)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_length) / window_length)
    return jnp.fft.rfft(frames * window.astype(np.float32).reshape([1] * audio.ndim + [window_length]))


def magnitude(spectrum: Complex[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Absolute values, with a gradient of 0 where they are 0, as torch has it (JAX: NaN)."""
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    return jnp.where(power > 0, jnp.sqrt(jnp.where(power > 0, power, 1)), 0)


@functools.cache
def mel_filters(rate: int, window_length: int, bands: int) -> Float[np.ndarray, "bins bands"]:
    """Triangles of equal area on Slaney's mel scale from 0 Hz to half the rate: `librosa.filters.mel`, transposed."""
    frequencies = np.linspace(0, rate / 2, window_length // 2 + 1)
    edges = _from_mel(np.linspace(0, _to_mel(rate / 2), bands + 2))
    low, center, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies[:, None] - low) / (center - low)
    falling = (high - frequencies[:, None]) / (high - center)
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)).astype(np.float32)


# Slaney's scale (Auditory Toolbox, 1998): linear up to 1 kHz, 15 mel; from there 27 mel for each factor of 6.4.
def _to_mel(frequency: float) -> float:
    return frequency * 3 / 200 if frequency < 1000 else 15 + 27 * float(np.log(frequency / 1000) / np.log(6.4))


def _from_mel(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27))
