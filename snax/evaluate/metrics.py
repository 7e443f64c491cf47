"""What is measured of a clip and its reconstruction, in NumPy: clips have all lengths, and XLA would compile for each.

Audio is one channel, (samples,), both of the same length. STOI and PESQ are those of the packages of these names.
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
    """All of them by name. PESQ takes most of the time."""
    found = {
        "mel": mel_distance(audio, target, rate),
        "stft": stft_distance(audio, target),
        "si_sdr": si_sdr(audio, target),
        "stoi": stoi(audio, target, rate),
    }
    return found | {"pesq": pesq(audio, target, rate)} if with_pesq else found


def mean(values: Iterable[float]) -> float:
    """Of those that are there: NaN is what could not be measured."""
    there = [value for value in values if not math.isnan(value)]
    return sum(there) / len(there) if there else math.nan


def mel_distance(audio: Audio, target: Audio, rate: int) -> float:
    """`snax.train.losses.mel_loss` of the two: lower is better."""
    total = 0.0
    for window_length, bands in MEL_SCALES:
        filters = mel_filters(rate, window_length, bands)
        ours, theirs = (_log10(_magnitudes(each, window_length) @ filters) for each in (audio, target))
        total += float(np.abs(ours - theirs).mean())
    return total


def stft_distance(audio: Audio, target: Audio) -> float:
    """`snax.train.losses.stft_loss` of the two: lower is better."""
    total = 0.0
    for window_length in STFT_WINDOWS:
        ours, theirs = (_magnitudes(each, window_length) for each in (audio, target))
        total += float(2 * np.abs(_log10(ours) - _log10(theirs)).mean() + np.abs(ours - theirs).mean())
    return total


def si_sdr(audio: Audio, target: Audio) -> float:
    """Scale-invariant ratio of signal to distortion in dB (Le Roux et al., 2019, arXiv:1811.02508): higher is better.

    A codec that is trained to sound right, not to keep phases, gets little.
    """
    audio, target = (each.astype(np.float64) - each.mean() for each in (audio, target))
    signal = target * (audio @ target / max(target @ target, 1e-20))
    distortion = audio - signal
    return float(10 * np.log10(max(signal @ signal, 1e-20) / max(distortion @ distortion, 1e-20)))


def stoi(audio: Audio, target: Audio, rate: int) -> float:
    """Short-time objective intelligibility (Taal et al., 2011), 0 to 1; NaN where there is not even 0.4 s of speech."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(target, audio, rate))
        except RuntimeWarning:  # what it says of too short clips
            return math.nan


def pesq(audio: Audio, target: Audio, rate: int) -> float:
    """Perceptual evaluation of speech quality, wide band (ITU-T P.862.2), 1 to 4.6; NaN where it finds no speech."""
    # Imported where it is used: it needs a C compiler to be installed, and training does without.
    import pesq as package

    if not target.any():  # which the package divides by
        return math.nan
    audio, target = (soxr.resample(each, rate, 16_000) for each in (audio, target))
    try:
        return float(package.pesq(16_000, target, audio, "wb"))
    except (package.NoUtterancesError, package.BufferTooShortError):
        return math.nan


def _magnitudes(audio: Audio, window_length: int) -> Float[np.ndarray, "frames bins"]:
    """The absolute values of `snax.evaluate.spectra.stft`."""
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_length) / window_length)).astype(np.float32)
    mirrored = np.pad(audio, window_length // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(mirrored, window_length)[:: window_length // 4]
    return np.abs(np.fft.rfft(frames * window))


def _log10(x: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(x, FLOOR))
