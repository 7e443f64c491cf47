"""Recorded and synthetic audio at any sampling rate, as (batch, 1, samples) in float32."""

from pathlib import Path

import numpy as np
import soundfile
import soxr

DATA = Path(__file__).parents[1] / "data"


def clip(name: str, rate: int, seconds: float) -> np.ndarray:
    """Return the first seconds of a file in `tests/data`, mixed to mono and resampled."""
    samples, file_rate = soundfile.read(DATA / name, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(1), file_rate, rate)[None, None, : int(seconds * rate)]


def kinds(rate: int, pad_multiple: int) -> dict[str, np.ndarray]:
    """Return different kinds of audio, with lengths at and near pad multiples.

    There are few different padded shapes, because each one is compiled.
    """
    rng = np.random.default_rng(0)
    click = np.zeros((1, 1, pad_multiple), np.float32)
    click[..., pad_multiple // 3] = 1
    return {
        "speech": clip("speech_3s.wav", rate, 1.3),
        "guitar": clip("guit_em9.flac", rate, 1.3),
        "tabla": clip("loop_tabla.flac", rate, 1.3),
        "noise": 0.1 * rng.standard_normal((2, 1, 2 * pad_multiple), np.float32),
        "silence": np.zeros((2, 1, pad_multiple + 1), np.float32),
        "click": click,
        "full scale": np.sign(rng.standard_normal((2, 1, 2 * pad_multiple - 1), np.float32)),
        "one sample": np.full((1, 1, 1), 0.5, np.float32),
    }
