"""Streams beside the sliding window: `python -m benchmarks.streaming`.

snac_24khz architecture, float32, one coarse frame (2048 samples, 85 ms, 7 tokens) a push, 7 s of speech. The weights
are drawn and scaled so that the model behaves like a trained one; how far off a short lookahead is depends on them.
The sliding window is what Orpheus' server does: once 28 tokens are there, decode the last 28 with each 7 more and give
out samples 2048 to 4096, so that the first group and the last two are never heard.
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
WINDOW = 4  # groups that the sliding window has

Push = Callable[[int], np.ndarray]  # takes the number of a coarse frame, gives the audio that comes out


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    speech = clip("speech_7s.wav", CONFIG.sampling_rate, 7)
    reference = trained_like(CONFIG.to_dict(), speech[..., : 4 * CONFIG.sampling_rate])
    model = converted(reference, CONFIG.to_dict())
    codes = model.encode(speech)
    groups = [np.asarray(level).reshape(1, codes[0].shape[1], -1) for level in codes]
    whole = np.asarray(model.decode(codes))
    print(f"{'':26}first audio:         a push:                  times      signal to")
    print(f"{'':26}codes of    computed in  median   slowest %   real time  error")
    for name, lookahead in (("exact", None), *((f"lookahead {n}", n) for n in (8, 6, 4, 2, 0))):
        row(f"snax, {name}", streamed(model, groups, lookahead), groups, whole)
    row("sliding window, snax", windowed(model.decode, groups), groups, whole)
    with torch.inference_mode(), mock.patch.object(torch, "randn", torch.zeros):  # without noise, as the others
        row("sliding window, torch", windowed(torch_decode(reference), groups), groups, whole)
    encoder = snax.StreamEncoder(model)
    state, seconds = encoder.init_state(), []
    for i in range(speech.shape[-1] // PAD):
        before = time.perf_counter()
        state, _ = encoder.step(state, speech[..., i * PAD : (i + 1) * PAD])
        seconds.append(time.perf_counter() - before)
    frame, median, latency = PAD / CONFIG.sampling_rate, np.median(seconds), encoder.latency / CONFIG.sampling_rate
    print(f"snax, encoder: {1000 * median:.1f} ms a push, {frame / median:.1f} x; codes {1000 * latency:.0f} ms behind")


def row(name: str, start: Callable[[], tuple[Push, int]], groups: list[np.ndarray], whole: np.ndarray) -> None:
    """A line of the table. `start` gives a fresh stream and the sample of `whole` that its audio begins with."""
    push, begins = start()
    count = groups[0].shape[1]
    for i in range(count):  # compiles
        push(i)
    push, begins = start()
    audio, seconds = [], []
    for i in range(count):
        before = time.perf_counter()
        audio.append(push(i))
        seconds.append(time.perf_counter() - before)
    first = next(i for i, piece in enumerate(audio) if piece.shape[2])
    heard = np.concatenate(audio, axis=2)
    expected = whole[..., begins : begins + heard.shape[2]]
    error = np.square(heard - expected).mean()
    below = 10 * np.log10(np.square(expected).mean() / error)
    off = "exact" if np.abs(heard - expected).max() < 1e-5 else f"{below:.0f} dB"
    frame, milliseconds = 1000 * PAD / CONFIG.sampling_rate, 1000 * np.array(seconds)
    median, slowest = np.median(milliseconds), np.percentile(milliseconds, 99)
    print(f"{name:26}{(first + 1) * frame:8.0f} ms{milliseconds[: first + 1].sum():8.0f} ms", end="")
    print(f"{median:9.1f} ms{slowest:9.1f} ms{frame / median:8.1f} x   {off}")


def streamed(model: snax.SNAC, groups: list[np.ndarray], lookahead: int | None) -> Callable[[], tuple[Push, int]]:
    decoder = snax.StreamDecoder(model, lookahead=lookahead)

    def start() -> tuple[Push, int]:
        state = decoder.init_state()

        def push(i: int) -> np.ndarray:
            nonlocal state
            state, audio = decoder.step(state, [level[:, i] for level in groups])
            return audio

        return push, 0

    return start


def torch_decode(reference: snac.SNAC) -> Callable[[list[np.ndarray]], np.ndarray]:
    return lambda codes: reference.decode([torch.from_numpy(level.copy()) for level in codes]).numpy()


def windowed(decode: Callable[[list[np.ndarray]], Any], groups: list[np.ndarray]) -> Callable[[], tuple[Push, int]]:
    def push(i: int) -> np.ndarray:
        if i + 1 < WINDOW:
            return np.zeros((1, 1, 0), np.float32)
        last = [level[:, i + 1 - WINDOW : i + 1].reshape(1, -1) for level in groups]
        return np.asarray(decode(last))[..., PAD : 2 * PAD]

    return lambda: (push, PAD)


if __name__ == "__main__":
    main()
