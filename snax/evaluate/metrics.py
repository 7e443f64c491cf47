"""Metrics of a clip and its reconstruction.

They are written in NumPy because clips have many lengths, and XLA would compile once for each. `audio` is the
reconstruction and `target` the original. Both are mono, (samples,), and of the same length. The packages `pystoi` and
`pesq` compute STOI and PESQ.
"""

import math
import warnings
from collections.abc import Iterable

import numpy as np
import pystoi
import soxr
from jaxtyping import Float

from .spectra import FLOOR, MEL_SCALES, STFT_WINDOWS, mel_filters

Audio = Float[np.ndarray, " samples"]


def scores(audio: Audio, target: Audio, rate: int, *, with_pesq: bool = False) -> dict[str, float]:
    """Return the metrics by name.

    Args:
        audio: the reconstruction.
        target: the original.
        rate: sampling rate in Hz.
        with_pesq: whether to include PESQ, which takes most of the time.
    """
    values = {
        "mel": mel_distance(audio, target, rate),
        "stft": stft_distance(audio, target),
        "si_sdr": si_sdr(audio, target),
        "stoi": stoi(audio, target, rate),
    }
    return values | {"pesq": pesq(audio, target, rate)} if with_pesq else values


def mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN, or NaN if there are none. NaN means not measurable."""
    measured = [value for value in values if not math.isnan(value)]
    return sum(measured) / len(measured) if measured else math.nan


def mel_distance(audio: Audio, target: Audio, rate: int) -> float:
    """Return the multi-scale mel distance, as `snax.train.losses.mel_loss` defines it. Lower is better."""
    total = 0.0
    for window_length, bands in MEL_SCALES:
        filters = mel_filters(rate, window_length, bands)
        log_mel, target_log_mel = (_log10(_magnitudes(signal, window_length) @ filters) for signal in (audio, target))
        total += float(np.abs(log_mel - target_log_mel).mean())
    return total


def stft_distance(audio: Audio, target: Audio) -> float:
    """Return the multi-scale STFT distance, as `snax.train.losses.stft_loss` defines it. Lower is better."""
    total = 0.0
    for window_length in STFT_WINDOWS:
        spectrum, target_spectrum = (_magnitudes(signal, window_length) for signal in (audio, target))
        log_distance = np.abs(_log10(spectrum) - _log10(target_spectrum)).mean()
        total += float(2 * log_distance + np.abs(spectrum - target_spectrum).mean())
    return total


def si_sdr(audio: Audio, target: Audio) -> float:
    """Return the scale-invariant signal-to-distortion ratio in dB. Higher is better.

    From Le Roux et al., 2019, arXiv:1811.02508. A codec that is trained for perceptual quality, not to preserve phases,
    scores low.
    """
    audio, target = (clip.astype(np.float64) - clip.mean() for clip in (audio, target))
    signal = target * (audio @ target / max(target @ target, 1e-20))
    distortion = audio - signal
    return float(10 * np.log10(max(signal @ signal, 1e-20) / max(distortion @ distortion, 1e-20)))


def stoi(audio: Audio, target: Audio, rate: int) -> float:
    """Return the short-time objective intelligibility (Taal et al., 2011), 0 to 1, or NaN for under 0.4 s of speech."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(target, audio, rate))
        except RuntimeWarning:  # pystoi warns when a clip is too short
            return math.nan


def pesq(audio: Audio, target: Audio, rate: int) -> float:
    """Return wide-band PESQ (ITU-T P.862.2), 1 to 4.6, or NaN if it finds no speech."""
    # Imported here because its installation needs a C compiler, and training does not use it.
    import pesq as package

    if not target.any():  # the package would divide by zero
        return math.nan
    audio, target = (soxr.resample(clip, rate, 16_000) for clip in (audio, target))
    try:
        return float(package.pesq(16_000, target, audio, "wb"))
    except (package.NoUtterancesError, package.BufferTooShortError):
        return math.nan


def _magnitudes(audio: Audio, window_length: int) -> Float[np.ndarray, "frames bins"]:
    """Return the absolute values of `snax.evaluate.spectra.stft`."""
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_length) / window_length)).astype(np.float32)
    mirrored = np.pad(audio, window_length // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(mirrored, window_length)[:: window_length // 4]
    return np.abs(np.fft.rfft(frames * window))


def _log10(x: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(x, FLOOR))
