"""Plots of spectrograms."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.mlab import specgram


def spectrograms(figure: Figure | SubFigure, audio: Mapping[str, Float[np.ndarray, " _"]], rate: int) -> None:
    """Plot spectrograms below each other, on one scale that ends 70 dB below the loudest point.

    Args:
        figure: the figure to draw into.
        audio: mono audio by the label of its plot.
        rate: sampling rate in Hz.
    """
    rows: list[Axes] = np.atleast_1d(figure.subplots(len(audio), 1, sharex=True)).tolist()
    powers = [np.asarray(specgram(samples, NFFT=512, Fs=rate, noverlap=384)[0]) for samples in audio.values()]
    loudest = 10 * np.log10(max(power.max() for power in powers) + 1e-12)
    for axes, name, power in zip(rows, audio, powers, strict=True):
        decibels = 10 * np.log10(power + 1e-12)
        extent = (0, audio[name].size / rate, 0, rate / 2000)
        axes.imshow(
            decibels, origin="lower", aspect="auto", extent=extent, vmin=loudest - 70, vmax=loudest, cmap="magma"
        )
        axes.set_ylabel(f"{name}, kHz")
    rows[-1].set_xlabel("seconds")
