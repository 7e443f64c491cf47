"""Every way to run SNAC on this machine, side by side: `python -m benchmarks.speed`.

Every system lives in a process of its own, as it would in use: in one process they spend each other's memory and
threads. For each architecture and case they take turns, so that a slow minute of the machine slows all of them. Their
tokens are compared first. Prints a table of multiples of real time, writes benchmarks/speed.json and docs/speed.png.
All draw the decoder's noise, as the reference does.
"""

import argparse
import contextlib
import datetime
import functools
import io
import json
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import snac
import snac.layers
import torch

from snax.codec.config import PUBLISHED_CONFIGS
from tests.helpers.recordings import clip
from tests.helpers.reference import converted, trained_like, without_weight_norm

# Batch and seconds. The 32 kHz architecture costs the reference three times as much, so it has the first two only.
CASES = {
    "snac_24khz": {"1 s": (1, 1), "10 s": (1, 10), "8 x 10 s": (8, 10), "60 s": (1, 60)},
    "snac_32khz": {"1 s": (1, 1), "10 s": (1, 10)},
}
SYSTEMS = ("snax", "torch", "torch.compile", "ONNX Runtime")
HERE = Path(__file__).parent
THREADS = len(os.sched_getaffinity(0))

# A function of no arguments that ends when its result is there.
Run = Callable[[], Any]


class Encode(torch.nn.Module):
    def __init__(self, model: snac.SNAC):
        super().__init__()
        self.model = model

    def forward(self, audio: torch.Tensor) -> list[torch.Tensor]:
        return self.model.quantizer(self.model.encoder(audio))[1]


class Decode(torch.nn.Module):
    def __init__(self, model: snac.SNAC):
        super().__init__()
        self.model = model

    def forward(self, *codes: torch.Tensor) -> torch.Tensor:
        return self.model.decode(list(codes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timings of each system and case (default: 5)")
    rounds = parser.parse_args().rounds
    rows = []
    with contextlib.ExitStack() as stack:
        contestants = {system: stack.enter_context(worker(serve, system)) for system in SYSTEMS}
        for name, case in ((name, case) for name, cases in CASES.items() for case in cases):
            tokens = {system: ask(worker, "prepare", name, case) for system, worker in contestants.items()}
            compare(tokens)
            for what in ("encode", "decode"):
                times = take_turns(contestants, what, rounds)
                batch, seconds = CASES[name][case]
                for system, spent in times.items():
                    speeds = sorted(batch * seconds / t for t in spent)
                    row = {"model": name, "what": what, "case": case, "system": system}
                    rows.append(row | {"median": statistics.median(speeds), "low": speeds[0], "high": speeds[-1]})
                print(line(rows[-len(times) :]), flush=True)
    results = {"machine": machine(), "rows": rows}
    (HERE / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, HERE.parent / "docs" / "speed.png")


@contextlib.contextmanager
def worker(function: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """A process that runs `function(connection, *args)` and answers `ask`. It ends with the context."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=function, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    yield ours
    ours.close()
    process.join()


def ask(worker: Connection, *request: str) -> Any:
    worker.send(request)
    return worker.recv()


def serve(connection: Connection, system: str) -> None:
    torch.set_num_threads(THREADS)
    with contextlib.suppress(EOFError), torch.inference_mode():
        while True:
            match connection.recv():
                case ("prepare", name, case):
                    runs = prepare(system, name, case)
                    connection.send([np.asarray(level) for level in runs["encode"]()])
                case (what,):
                    connection.send(turn(runs[what]))


def prepare(system: str, name: str, case: str) -> dict[str, Run]:
    """What encodes and what decodes the case's audio with a system."""
    config = PUBLISHED_CONFIGS[name]
    batch, seconds = CASES[name][case]
    audio, reference = weights(name)
    samples = seconds * config.sampling_rate // config.pad_multiple * config.pad_multiple
    audio = np.tile(audio, (batch, 1, 10))[..., :samples]
    torch_audio = torch.from_numpy(audio)
    torch_codes = reference.encode(torch_audio)
    codes = [level.numpy() for level in torch_codes]
    if system == "snax":
        model, key = converted(reference, config.to_dict()), jax.random.key(0)
        device_audio, device_codes = jax.device_put(audio), jax.device_put(codes)
        return {
            "encode": lambda: jax.block_until_ready(model.encode(device_audio)),
            "decode": lambda: jax.block_until_ready(model.decode(device_codes, key=key)),
        }
    if system == "ONNX Runtime":
        plain = without_weight_norm(reference, config)
        onnx_encode = onnx_session(Encode(plain), (torch_audio,))
        onnx_decode = onnx_session(Decode(plain), tuple(torch_codes))
        feeds = {value.name: level for value, level in zip(onnx_decode.get_inputs(), codes, strict=True)}
        return {
            "encode": lambda: onnx_encode.run(None, {onnx_encode.get_inputs()[0].name: audio}),
            "decode": lambda: onnx_decode.run(None, feeds),
        }
    encode, decode = Encode(reference), Decode(reference)
    if system == "torch.compile":
        encode, decode = torch.compile(encode), torch.compile(decode)
    return {"encode": lambda: encode(torch_audio), "decode": lambda: decode(*torch_codes)}


@functools.cache
def weights(name: str) -> tuple[np.ndarray, snac.SNAC]:
    """Seven seconds of speech, and the reference with weights that behave on it as if trained."""
    config = PUBLISHED_CONFIGS[name]
    speech = clip("speech_7s.wav", config.sampling_rate, 7)
    with torch.inference_mode(False):
        reference = trained_like(config.to_dict(), speech[..., : 4 * config.sampling_rate])
    return speech, reference


def compare(tokens: dict[str, list[np.ndarray]]) -> None:
    for system, codes in tokens.items():
        equal = [float((ours == level).mean()) for ours, level in zip(codes, tokens["torch"], strict=True)]
        # A near tie, which the order of float32 sums decides, may change a coarse code and the finer ones with it.
        if min(equal) < 0.998:
            raise SystemExit(f"{system} does not give the reference's tokens: {equal} are equal, by level")


def onnx_session(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Any:
    def snake(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:  # the scripted one's reshapes do not export
        return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)

    def repeat_interleave(x: torch.Tensor, repeats: int, dim: int) -> torch.Tensor:  # exported, it forgets its length
        return x[..., None].expand(*x.shape, repeats).flatten(dim - 1)

    buffer = io.BytesIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mock.patch.object(snac.layers, "snake", snake))
        stack.enter_context(mock.patch.object(torch.Tensor, "repeat_interleave", repeat_interleave))
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # that shapes are frozen, which is what is wanted
        torch.onnx.export(module, tuple(tensor.clone() for tensor in arguments), buffer, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])


def take_turns(contestants: dict[str, Connection], what: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each system, round by round; a first round warms up."""
    times: dict[str, list[float]] = {system: [] for system in contestants}
    for i in range(rounds + 1):
        for system, worker in contestants.items():
            seconds = ask(worker, what)
            if i:
                times[system].append(seconds)
    return times


def turn(run: Run) -> float:
    """The median of three seconds' runs without the first, whose caches are cold; or of one that takes longer."""
    times: list[float] = []
    while sum(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def line(rows: list[dict[str, Any]]) -> str:
    cells = [f"{row['system']} {row['median']:6.1f} ({row['low']:.1f}-{row['high']:.1f})" for row in rows]
    return f"{rows[0]['model']}  {rows[0]['what']}  {rows[0]['case']:>8}   " + "   ".join(cells)


def machine() -> dict[str, Any]:
    versions = {"jax": jax.__version__, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{THREADS} cores of {processor()}",
        "threads": THREADS,
        **versions,
    }


def processor() -> str:
    """Its name where Linux says it."""
    with contextlib.suppress(OSError):
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.startswith("model name"):
                return entry.partition(": ")[2]
    return platform.machine()


def draw(results: dict[str, Any], path: Path) -> None:
    rows, machine = results["rows"], results["machine"]
    widths = [len(cases) for cases in CASES.values()]
    figure, grid = plt.subplots(2, len(CASES), figsize=(11, 6), layout="constrained", width_ratios=widths)
    title = f"times real time, float32, {machine['device']}, {machine['date']}"
    figure.suptitle(title)
    for line_of_axes, what in zip(grid, ("encode", "decode"), strict=True):
        for axes, (name, cases) in zip(line_of_axes, CASES.items(), strict=True):
            chosen = [row for row in rows if row["model"] == name and row["what"] == what]
            for i, system in enumerate(dict.fromkeys(row["system"] for row in chosen)):
                medians = [row["median"] for row in chosen if row["system"] == system]
                bars = axes.bar(np.arange(len(cases)) + 0.2 * (i - 1.5), medians, 0.2, label=system)
                axes.bar_label(bars, fmt="%.0f" if max(medians) > 10 else "%.1f", fontsize=8)
            axes.margins(y=0.1)
            axes.set_xticks(range(len(cases)), cases)
            axes.set_title(f"{name}, {what}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
