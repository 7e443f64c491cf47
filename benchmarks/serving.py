"""Many streams at once: `python -m benchmarks.serving`. Writes benchmarks/serving.json.

Every stream gets one coarse frame (2048 samples, 85 ms, 7 tokens) per step, and a step must take less than that.
Compared are a `StreamPool`, whose streams are independent; a `StreamDecoder`, whose streams advance together; and the
sliding window of Orpheus servers, which decodes the last 28 tokens of every stream again, batched in torch and in ONNX
Runtime. Each runs in a process of its own, and they take turns. snac_24khz architecture, float32, without noise.

Time to first audio is that of a new stream in a `StreamPool` whose other slots are busy, from its first codes to its
first samples. The sliding window needs one step.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch

import snax
from benchmarks.speed import THREADS, Decode, ask, machine, onnx_session, weights, worker
from snax.codec.config import PUBLISHED_CONFIGS
from tests.helpers.reference import converted, without_weight_norm

NAME, CONFIG = "snac_24khz", PUBLISHED_CONFIGS["snac_24khz"]
FRAME_MS = 1000 * CONFIG.pad_multiple / CONFIG.sampling_rate
WINDOW = 4  # coarse frames
SLOTS = (1, 4, 8, 16, 24)
SYSTEMS = ("StreamPool", "StreamDecoder", "sliding window, torch", "sliding window, ONNX Runtime")
ROUNDS, STEPS, WINDOW_STEPS, NEW_STREAMS = 3, 60, 12, 10  # a step of the sliding window may take seconds

Step = Callable[[], Any]  # decodes one more coarse frame of every stream; returns when the audio is on the host


def main() -> None:
    rows = []
    with contextlib.ExitStack() as stack:
        workers = {system: stack.enter_context(worker(serve, system)) for system in SYSTEMS}
        for slots in SLOTS:
            for pipe in workers.values():
                ask(pipe, "prepare", str(slots))
            seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
            for _ in range(ROUNDS):
                for system, pipe in workers.items():
                    steps = WINDOW_STEPS if system.startswith("sliding") else STEPS
                    seconds[system] += ask(pipe, "time", str(steps))
            first_audio = ask(workers["StreamPool"], "first audio", str(NEW_STREAMS))
            rows.append({"slots": slots} | {system: summary(times) for system, times in seconds.items()})
            rows[-1]["StreamPool"]["first audio"] = 1000 * float(np.median(first_audio))
            print(json.dumps(rows[-1]), flush=True)
    result = {"machine": machine(), "frame ms": FRAME_MS, "rows": rows}
    (Path(__file__).parent / "serving.json").write_text(json.dumps(result, indent=1) + "\n")


def summary(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile of the steps in milliseconds."""
    milliseconds = 1000 * np.array(seconds)
    return {"median": float(np.median(milliseconds)), "p99": float(np.percentile(milliseconds, 99))}


def serve(connection: Connection, system: str) -> None:
    torch.set_num_threads(THREADS)
    with contextlib.suppress(EOFError), torch.inference_mode(), mock.patch.object(torch, "randn", torch.zeros):
        while True:
            match connection.recv():
                case ("prepare", slots):
                    step = prepare(system, int(slots))
                    step()  # compiles
                    connection.send(None)
                case ("time", count):
                    connection.send(time_steps(step, int(count)))
                case ("first audio", count):
                    connection.send([step.first_audio() for _ in range(int(count))])


def time_steps(step: Step, count: int = STEPS) -> list[float]:
    """Return the seconds of each step, after two that are not counted."""
    times = []
    for _ in range(count + 2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times[2:]


def prepare(system: str, slots: int) -> Step:
    speech, reference = weights(NAME)
    codes = [level.numpy() for level in reference.encode(torch.from_numpy(speech))]
    groups = split_groups(codes, slots)
    if system == "StreamPool":
        return BusyPool(converted(reference, CONFIG.to_dict()), groups)
    if system == "StreamDecoder":
        return lockstep(converted(reference, CONFIG.to_dict()), groups)
    if system == "sliding window, torch":
        return window(groups, lambda codes: reference.decode([torch.from_numpy(level) for level in codes]).numpy())
    plain = without_weight_norm(reference, CONFIG)
    example = tuple(torch.zeros(slots, WINDOW * level.shape[2], dtype=torch.int64) for level in groups)
    session = onnx_session(Decode(plain), example)
    names = [value.name for value in session.get_inputs()]
    return window(groups, lambda codes: session.run(None, dict(zip(names, codes, strict=False)))[0])


def split_groups(codes: list[np.ndarray], slots: int) -> list[np.ndarray]:
    """Return for each level the codes of each coarse frame and stream, (frames, slots, codes). Streams are shifted."""
    frames = codes[0].shape[1]
    by_frame = [level[0].reshape(frames, -1) for level in codes]
    return [np.stack([np.roll(level, -slot, axis=0) for slot in range(slots)], axis=1) for level in by_frame]


class BusyPool:
    """A `StreamPool` with a stream in every slot. Calling it is a step."""

    def __init__(self, model: snax.SNAC, groups: list[np.ndarray], mesh: jax.sharding.Mesh | None = None):
        self.pool = snax.StreamPool(model, groups[0].shape[1], dtype="int16", mesh=mesh)
        self.streams = [self.pool.open() for _ in range(self.pool.free)]
        self.groups, self.frames = groups, itertools.cycle(range(len(groups[0])))

    def __call__(self) -> list[Any]:
        frame = next(self.frames)
        for slot, stream in enumerate(self.streams):
            stream.feed([level[frame, slot] for level in self.groups])
        chunks = self.pool.step().chunks
        assert len(chunks) == len(self.streams)
        return chunks

    def first_audio(self) -> float:
        """Replace the first stream by a new one, and return the seconds to its first samples."""
        self.streams[0].abort()
        start = time.perf_counter()
        self.streams[0] = self.pool.open()
        while not any(chunk.stream is self.streams[0] and len(chunk.output) for chunk in self()):
            pass
        return time.perf_counter() - start


def lockstep(model: snax.SNAC, groups: list[np.ndarray]) -> Step:
    decoder = snax.StreamDecoder(model)
    state, frames = decoder.init_state(groups[0].shape[1]), itertools.cycle(range(len(groups[0])))

    def step() -> None:
        nonlocal state
        frame = next(frames)
        state, _ = decoder.step(state, [level[frame].astype(np.int32) for level in groups])

    return step


def window(groups: list[np.ndarray], decode: Callable[[list[np.ndarray]], np.ndarray]) -> Step:
    frames = itertools.cycle(range(len(groups[0]) - WINDOW))

    def step() -> np.ndarray:
        frame = next(frames)
        codes = [np.concatenate(level[frame : frame + WINDOW], axis=1) for level in groups]
        return decode(codes)[..., CONFIG.pad_multiple : 2 * CONFIG.pad_multiple]

    return step


if __name__ == "__main__":
    main()
