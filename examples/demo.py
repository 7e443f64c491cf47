"""Hear and see what SNAC does to a clip of speech: `make demo`, or `python examples/demo.py [AUDIO] [OUT]`.

Writes the codes, the reconstructed audio and a picture of both, and prints what it cost.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import soundfile
import soxr
from huggingface_hub.utils import logging as hub_logging
from matplotlib import mlab

import snax

NAME, BUNDLED = "snac_24khz", "mini_16khz"
CLIP = Path(__file__).parents[1] / "tests" / "data" / "speech_7s.wav"


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else CLIP
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("demo")
    out.mkdir(parents=True, exist_ok=True)

    model, name = load()
    config = model.config
    audio = read_mono(source, config.sampling_rate)
    codes, encode_seconds = timed(model.encode, audio)
    decoded, decode_seconds = timed(model.decode, codes)
    reconstructed = np.asarray(decoded)[0, 0, : audio.shape[-1]]

    stem = out / source.stem
    np.savez(f"{stem}_codes.npz", *codes)
    soundfile.write(f"{stem}_{name}.wav", reconstructed, config.sampling_rate)
    title = f"{source.name} through {name}, {config.bitrate / 1000:.2f} kbps"
    draw(f"{stem}_{name}.png", config, audio[0, 0], codes, reconstructed, title)

    seconds = audio.shape[-1] / config.sampling_rate
    tokens = [level.size for level in codes]
    print(f"  {source.name}: {seconds:.2f} s at {config.sampling_rate} Hz")
    print(f"  tokens:  {' + '.join(map(str, tokens))} = {sum(tokens)}, coarse to fine")
    print(f"  bitrate: {config.bitrate / 1000:.2f} kbps")
    device = jax.devices()[0].device_kind
    encode_speed, decode_speed = seconds / encode_seconds, seconds / decode_seconds
    print(f"  speed:   encoded at {encode_speed:.0f} x real time, decoded at {decode_speed:.0f} x, on {device}")
    print(f"  wrote:   {stem}_codes.npz, {stem}_{name}.wav, {stem}_{name}.png")


def load() -> tuple[snax.SNAC, str]:
    """The published model and its name, or where it can't be had the small one that comes with snax."""
    print(f"Loading {NAME} ...")
    hub_logging.set_verbosity_error()  # where there is no network, its five tries fill the screen
    try:
        return snax.load(NAME), NAME
    except ConnectionError as error:
        print(f"{NAME} can't be had: {error}\n")
        print(f"Going on with {BUNDLED}, which comes with snax: a codec for speech, 17 times smaller. IT DOES NOT")
        print(f"SOUND LIKE {NAME}: it shows how things work, not how good SNAC is.\n")
        return snax.load(BUNDLED), BUNDLED


def read_mono(path: Path, rate: int) -> np.ndarray:
    """(1, 1, samples) at `rate`."""
    samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    resampled: np.ndarray = soxr.resample(samples.mean(axis=1), file_rate, rate)
    return resampled[None, None]


def timed(method: Callable[[Any], Any], argument: Any) -> tuple[Any, float]:
    """The result, and the seconds that a second call takes: the first one compiles."""
    jax.block_until_ready(method(argument))
    start = time.perf_counter()
    result = jax.block_until_ready(method(argument))
    return result, time.perf_counter() - start


def draw(
    path: str,
    config: snax.SNACConfig,
    audio: np.ndarray,
    codes: tuple[jax.Array, ...],
    reconstructed: np.ndarray,
    title: str,
) -> None:
    """Both spectrograms, and between them the codes, each as wide as the time it stands for."""
    figure, (above, grid, below) = plt.subplots(
        3, 1, figsize=(12, 8), sharex=True, height_ratios=[3, 2, 3], layout="constrained"
    )
    rate = config.sampling_rate
    figure.suptitle(title)
    for axes, samples, name in ((above, audio, "original"), (below, reconstructed, "reconstructed")):
        spectrogram: Any = mlab.specgram(samples, NFFT=1024, Fs=rate, noverlap=768)
        power, frequencies, _ = spectrogram
        decibels = 10 * np.log10(power + 1e-12)
        extent = (0, samples.size / rate, 0, frequencies[-1] / 1000)
        axes.imshow(decibels, origin="lower", aspect="auto", extent=extent, vmin=-100, vmax=-30, cmap="magma")
        axes.set_ylabel(f"{name}, kHz")
    seconds = codes[-1].shape[-1] * config.hop_length / rate
    for i, level in enumerate(codes):
        grid.imshow(level, aspect="auto", extent=(0, seconds, i + 0.95, i + 0.05), cmap="twilight", vmin=0, vmax=4095)
    grid.set(ylim=(len(codes), 0), xlim=(0, audio.size / rate), ylabel="codes, by level")
    grid.set_yticks([i + 0.5 for i in range(len(codes))], [f"{i}" for i in range(len(codes))])
    below.set_xlabel("seconds")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
