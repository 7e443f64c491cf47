"""Streaming compared with a sliding window: `python -m benchmarks.streaming`.

snac_24khz architecture, float32, one coarse frame (2048 samples, 85 ms, 7 tokens) per step, 7 s of speech. Weights are
random, scaled so that the model behaves like a trained one. The error of a short lookahead depends on the weights.

The sliding window is the method of the Orpheus server. From the 28th token on, for every 7 new tokens, it decodes the
last 28 and returns samples 2048 to 4096. The first group and the last two groups are never played.
"""

import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import snac
import torch

import snax
from snax.codec.config import PUBLISHED_CONFIGS
from tests.helpers.recordings import clip
from tests.helpers.reference import converted, trained_like

CONFIG = PUBLISHED_CONFIGS["snac_24khz"]
PAD = CONFIG.pad_multiple
WINDOW = 4  # coarse frames in the sliding window

Step = Callable[[int], np.ndarray]  # from the index of a coarse frame to the audio that is now final


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    speech = clip("speech_7s.wav", CONFIG.sampling_rate, 7)
    reference = trained_like(CONFIG.to_dict(), speech[..., : 4 * CONFIG.sampling_rate])
    model = converted(reference, CONFIG.to_dict())
    codes = model.encode(speech)
    groups = [np.asarray(level).reshape(1, codes[0].shape[1], -1) for level in codes]
    whole = np.asarray(model.decode(codes))
    print(f"{'':26}first audio            step                    times      signal-to-")
    print(f"{'':26}after codes  compute   median      99 %        real time  error ratio")
    for name, lookahead in (("exact", None), *((f"lookahead {n}", n) for n in (8, 6, 4, 2, 0))):
        row(f"snax, {name}", streamed(model, groups, lookahead), groups, whole)
    row("sliding window, snax", windowed(model.decode, groups), groups, whole)
    with torch.inference_mode(), mock.patch.object(torch, "randn", torch.zeros):  # without noise, as in the other rows
        row("sliding window, torch", windowed(torch_decode(reference), groups), groups, whole)
    encoder = snax.StreamEncoder(model)
    state, seconds = encoder.init_state(), []
    for i in range(speech.shape[-1] // PAD):
        start = time.perf_counter()
        state, _ = encoder.step(state, speech[..., i * PAD : (i + 1) * PAD])
        seconds.append(time.perf_counter() - start)
    frame, median, latency = PAD / CONFIG.sampling_rate, np.median(seconds), encoder.latency / CONFIG.sampling_rate
    print(f"snax, encoder: {1000 * median:.1f} ms per step, {frame / median:.1f} x real time, ", end="")
    print(f"latency {1000 * latency:.0f} ms")


def row(name: str, start: Callable[[], tuple[Step, int]], groups: list[np.ndarray], whole: np.ndarray) -> None:
    """Print a row of the table. `start` returns a new stream and the position in `whole` of its first sample."""
    step, offset = start()
    count = groups[0].shape[1]
    for i in range(count):  # compiles
        step(i)
    step, offset = start()
    pieces, seconds = [], []
    for i in range(count):
        before = time.perf_counter()
        pieces.append(step(i))
        seconds.append(time.perf_counter() - before)
    first = next(i for i, piece in enumerate(pieces) if piece.shape[2])
    audio = np.concatenate(pieces, axis=2)
    expected = whole[..., offset : offset + audio.shape[2]]
    error = np.square(audio - expected).mean()
    ratio = 10 * np.log10(np.square(expected).mean() / error)
    quality = "exact" if np.abs(audio - expected).max() < 1e-5 else f"{ratio:.0f} dB"
    frame, milliseconds = 1000 * PAD / CONFIG.sampling_rate, 1000 * np.array(seconds)
    median, slow = np.median(milliseconds), np.percentile(milliseconds, 99)
    print(f"{name:26}{(first + 1) * frame:8.0f} ms{milliseconds[: first + 1].sum():8.0f} ms", end="")
    print(f"{median:9.1f} ms{slow:9.1f} ms{frame / median:8.1f} x   {quality}")


def streamed(model: snax.SNAC, groups: list[np.ndarray], lookahead: int | None) -> Callable[[], tuple[Step, int]]:
    decoder = snax.StreamDecoder(model, lookahead=lookahead)

    def start() -> tuple[Step, int]:
        state = decoder.init_state()

        def step(i: int) -> np.ndarray:
            nonlocal state
            state, audio = decoder.step(state, [level[:, i] for level in groups])
            return audio

        return step, 0

    return start


def torch_decode(reference: snac.SNAC) -> Callable[[list[np.ndarray]], np.ndarray]:
    return lambda codes: reference.decode([torch.from_numpy(level.copy()) for level in codes]).numpy()


def windowed(decode: Callable[[list[np.ndarray]], Any], groups: list[np.ndarray]) -> Callable[[], tuple[Step, int]]:
    def step(i: int) -> np.ndarray:
        if i + 1 < WINDOW:
            return np.zeros((1, 1, 0), np.float32)
        last = [level[:, i + 1 - WINDOW : i + 1].reshape(1, -1) for level in groups]
        return np.asarray(decode(last))[..., PAD : 2 * PAD]

    return lambda: (step, PAD)


if __name__ == "__main__":
    main()
