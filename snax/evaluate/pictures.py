"""Spectrograms, for whoever would rather look."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.mlab import specgram


def spectrograms(figure: Figure | SubFigure, audio: Mapping[str, Float[np.ndarray, " _"]], rate: int) -> None:
    """One below the other, each called by its key, all on one scale: 70 dB from the loudest down."""
    rows: list[Axes] = np.atleast_1d(figure.subplots(len(audio), 1, sharex=True)).tolist()
    powers = [np.asarray(specgram(each, NFFT=512, Fs=rate, noverlap=384)[0]) for each in audio.values()]
    loudest = 10 * np.log10(max(power.max() for power in powers) + 1e-12)
    for axes, name, power in zip(rows, audio, powers, strict=True):
        decibels = 10 * np.log10(power + 1e-12)
        extent = (0, audio[name].size / rate, 0, rate / 2000)
        axes.imshow(
            decibels, origin="lower", aspect="auto", extent=extent, vmin=loudest - 70, vmax=loudest, cmap="magma"
        )
        axes.set_ylabel(f"{name}, kHz")
    rows[-1].set_xlabel("seconds")
