"""Compare the speed of snax, torch and ONNX Runtime on CPUs: `python -m benchmarks.speed`.

Each system runs in a process of its own, because in one process they compete for memory and threads. For each
architecture and case the systems take turns, so that a slow minute of the machine affects all of them. Before that,
their tokens are compared. All systems draw the decoder's noise, as the reference does. Prints a table of multiples of
real time, and writes benchmarks/speed.json and docs/speed.png.
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

# (batch, seconds). The reference is three times slower at 32 kHz, so there are only two cases for it.
CASES = {
    "snac_24khz": {"1 s": (1, 1), "10 s": (1, 10), "8 x 10 s": (8, 10), "60 s": (1, 60)},
    "snac_32khz": {"1 s": (1, 1), "10 s": (1, 10)},
}
SYSTEMS = ("snax", "torch", "torch.compile", "ONNX Runtime")
HERE = Path(__file__).parent
THREADS = len(os.sched_getaffinity(0))

Run = Callable[[], Any]  # returns when its result is ready


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
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each system and case (default: 5)")
    rounds = parser.parse_args().rounds
    rows = []
    with contextlib.ExitStack() as stack:
        workers = {system: stack.enter_context(worker(serve, system)) for system in SYSTEMS}
        for name, case in ((name, case) for name, cases in CASES.items() for case in cases):
            tokens = {system: ask(connection, "prepare", name, case) for system, connection in workers.items()}
            compare(tokens)
            for operation in ("encode", "decode"):
                times = take_turns(workers, operation, rounds)
                batch, seconds = CASES[name][case]
                for system, system_times in times.items():
                    speeds = sorted(batch * seconds / t for t in system_times)
                    row = {"model": name, "what": operation, "case": case, "system": system}
                    rows.append(row | {"median": statistics.median(speeds), "low": speeds[0], "high": speeds[-1]})
                print(line(rows[-len(times) :]), flush=True)
    results = {"machine": machine(), "rows": rows}
    (HERE / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, HERE.parent / "docs" / "speed.png")


@contextlib.contextmanager
def worker(function: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """Run `function(connection, *args)` in a process until the context ends. Yields the connection for `ask`."""
    connection, child_connection = multiprocessing.Pipe()
    args = (child_connection, *args)
    process = multiprocessing.get_context("spawn").Process(target=function, args=args, daemon=True)
    process.start()
    child_connection.close()  # so that `recv` raises EOFError when the process has ended
    yield connection
    connection.close()
    process.join()


def ask(connection: Connection, *request: str) -> Any:
    connection.send(request)
    return connection.recv()


def serve(connection: Connection, system: str) -> None:
    torch.set_num_threads(THREADS)
    with contextlib.suppress(EOFError), torch.inference_mode():
        while True:
            match connection.recv():
                case ("prepare", name, case):
                    runs = prepare(system, name, case)
                    connection.send([np.asarray(level) for level in runs["encode"]()])
                case (operation,):
                    connection.send(median_seconds(runs[operation]))


def prepare(system: str, name: str, case: str) -> dict[str, Run]:
    """Return the functions that encode and decode the case's audio with a system."""
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
    """Return seven seconds of speech, and the reference with weights that behave on it like trained ones."""
    config = PUBLISHED_CONFIGS[name]
    speech = clip("speech_7s.wav", config.sampling_rate, 7)
    with torch.inference_mode(False):
        reference = trained_like(config.to_dict(), speech[..., : 4 * config.sampling_rate])
    return speech, reference


def compare(tokens: dict[str, list[np.ndarray]]) -> None:
    for system, codes in tokens.items():
        equal = [float((level == expected).mean()) for level, expected in zip(codes, tokens["torch"], strict=True)]
        # The order of float32 sums decides near ties. One may change a coarse code and the finer codes after it.
        if min(equal) < 0.998:
            raise SystemExit(f"The tokens of {system} differ from the reference's. Equal fraction by level: {equal}.")


def onnx_session(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Any:
    def snake(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:  # the scripted original cannot be exported
        return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)

    def repeat_interleave(x: torch.Tensor, repeats: int, dim: int) -> torch.Tensor:  # the export loses static lengths
        return x[..., None].expand(*x.shape, repeats).flatten(dim - 1)

    buffer = io.BytesIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mock.patch.object(snac.layers, "snake", snake))
        stack.enter_context(mock.patch.object(torch.Tensor, "repeat_interleave", repeat_interleave))
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # about constant shapes, which are intended
        torch.onnx.export(module, tuple(tensor.clone() for tensor in arguments), buffer, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])


def take_turns(workers: dict[str, Connection], operation: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each system in each round, after one warm-up round."""
    times: dict[str, list[float]] = {system: [] for system in workers}
    for i in range(rounds + 1):
        for system, connection in workers.items():
            seconds = ask(connection, operation)
            if i:
                times[system].append(seconds)
    return times


def median_seconds(run: Run) -> float:
    """Return the median time of three seconds of runs, without the first (cold caches) unless it is the only one."""
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
    """Return the processor's name on Linux, otherwise the machine type."""
    with contextlib.suppress(OSError):
        for entry in Path("/proc/cpuinfo").read_text().splitlines():
            if entry.startswith("model name"):
                return entry.partition(": ")[2]
    return platform.machine()


def draw(results: dict[str, Any], path: Path) -> None:
    rows, machine = results["rows"], results["machine"]
    widths = [len(cases) for cases in CASES.values()]
    figure, grid = plt.subplots(2, len(CASES), figsize=(11, 6), layout="constrained", width_ratios=widths)
    figure.suptitle(f"times real time, float32, {machine['device']}, {machine['date']}")
    for axes_row, operation in zip(grid, ("encode", "decode"), strict=True):
        for axes, (name, cases) in zip(axes_row, CASES.items(), strict=True):
            selected = [row for row in rows if row["model"] == name and row["what"] == operation]
            for i, system in enumerate(dict.fromkeys(row["system"] for row in selected)):
                medians = [row["median"] for row in selected if row["system"] == system]
                bars = axes.bar(np.arange(len(cases)) + 0.2 * (i - 1.5), medians, 0.2, label=system)
                axes.bar_label(bars, fmt="%.0f" if max(medians) > 10 else "%.1f", fontsize=8)
            axes.margins(y=0.1)
            axes.set_xticks(range(len(cases)), cases)
            axes.set_title(f"{name}, {operation}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def flop(model: snac.SNAC, audio: torch.Tensor) -> dict[str, float]:
    """Count the floating-point operations of the reference's convolutions and linear layers."""
    total = 0

    def count(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, torch.nn.ConvTranspose1d):
            total += 2 * inputs[0].numel() * module.out_channels // module.groups * module.kernel_size[0]
        elif isinstance(module, torch.nn.Conv1d):
            total += 2 * output.numel() * module.in_channels // module.groups * module.kernel_size[0]
        elif isinstance(module, torch.nn.Linear):
            total += 2 * output.numel() * module.in_features

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    codes = Encode(model)(audio)
    encode, total = total, 0
    Decode(model)(*codes)
    for hook in hooks:
        hook.remove()
    return {"encode": encode, "decode": total}


if __name__ == "__main__":
    main()
