"""Every way to run SNAC on this machine, side by side: `python -m benchmarks.speed`.

For each architecture and case the systems take turns, so that a slow minute of the machine slows all of them. Their
tokens are compared first. Prints a table of multiples of real time, writes benchmarks/speed.json and speed.png.
All draw the decoder's noise, as the reference does. On an NVIDIA GPU with jax[cuda12] all but ONNX Runtime use it.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
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

import snax
from snax.config import PUBLISHED_CONFIGS
from tests.audio import clip
from tests.reference import converted, trained_like, without_weight_norm

# Batch and seconds. The 32 kHz architecture costs the reference three times as much, so it has the first two only.
CASES = {
    "snac_24khz": {"1 s": (1, 1), "10 s": (1, 10), "8 x 10 s": (8, 10), "60 s": (1, 60)},
    "snac_32khz": {"1 s": (1, 1), "10 s": (1, 10)},
}
HERE = Path(__file__).parent

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
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # its default on a GPU, which changes tokens
    rows = []
    for name, cases in CASES.items():
        config = PUBLISHED_CONFIGS[name]
        speech = clip("speech_7s.wav", config.sampling_rate, 7)
        reference = trained_like(config.to_dict(), speech[..., : 4 * config.sampling_rate])
        model = converted(reference, config.to_dict())
        reference.to(torch_device())
        for case, (batch, seconds) in cases.items():
            samples = seconds * config.sampling_rate // config.pad_multiple * config.pad_multiple
            audio = np.tile(speech, (batch, 1, 10))[..., :samples]
            encoders, decoders = systems(model, reference, audio, threads)
            for what, runs in (("encode", encoders), ("decode", decoders)):
                times = take_turns(runs, rounds)
                for system, spent in times.items():
                    speeds = sorted(batch * samples / config.sampling_rate / t for t in spent)
                    row = {"model": name, "what": what, "case": case, "system": system}
                    rows.append(row | {"median": statistics.median(speeds), "low": speeds[0], "high": speeds[-1]})
                print(line(rows[-len(runs) :]), flush=True)
    results = {"machine": machine(threads), "rows": rows}
    (HERE / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, HERE / "speed.png")


def systems(
    model: snax.SNAC, reference: snac.SNAC, audio: np.ndarray, threads: int
) -> tuple[dict[str, Run], dict[str, Run]]:
    """What encodes `audio` and what decodes its codes, for each system. Fails unless their tokens agree."""
    torch_audio = torch.from_numpy(audio).to(torch_device())
    with torch.inference_mode():
        torch_codes = reference.encode(torch_audio)
    codes = [level.cpu().numpy() for level in torch_codes]
    device_audio, device_codes = jax.device_put(audio), jax.device_put(codes)
    key = jax.random.key(0)
    compiled_encode, compiled_decode = torch.compile(Encode(reference)), torch.compile(Decode(reference))
    encoders: dict[str, Run] = {
        "snax": lambda: jax.block_until_ready(model.encode(device_audio)),
        "torch": lambda: finished(reference.encode(torch_audio)),
        "torch.compile": lambda: finished(compiled_encode(torch_audio)),
    }
    decoders: dict[str, Run] = {
        "snax": lambda: jax.block_until_ready(model.decode(device_codes, key=key)),
        "torch": lambda: finished(reference.decode(torch_codes)),
        "torch.compile": lambda: finished(compiled_decode(*torch_codes)),
    }
    if torch_device() == "cpu":
        plain = without_weight_norm(reference, model.config)
        onnx_encode = onnx_session(Encode(plain), (torch_audio,), threads)
        onnx_decode = onnx_session(Decode(plain), tuple(torch_codes), threads)
        feeds = {value.name: level for value, level in zip(onnx_decode.get_inputs(), codes, strict=True)}
        encoders["ONNX Runtime"] = lambda: onnx_encode.run(None, {onnx_encode.get_inputs()[0].name: audio})
        decoders["ONNX Runtime"] = lambda: onnx_decode.run(None, feeds)
    for system, encode in encoders.items():
        with torch.inference_mode():
            found = [level.cpu() if isinstance(level, torch.Tensor) else level for level in encode()]
        equal = [float((np.asarray(ours) == level).mean()) for ours, level in zip(found, codes, strict=True)]
        # One in a thousand may be a near tie that another order of float32 sums decides.
        if min(equal) < 0.999:
            raise SystemExit(f"{system} does not give the reference's tokens: {equal} are equal, by level")
    return encoders, decoders


def torch_device() -> str:
    """Where JAX computes, as torch calls it."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def finished(result: Any) -> Any:
    if torch_device() == "cuda":
        torch.cuda.synchronize()
    return result


def onnx_session(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], threads: int) -> Any:
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
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])


def take_turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each system, round by round; a first round warms up."""
    times: dict[str, list[float]] = {system: [] for system in runs}
    with torch.inference_mode():
        for i in range(rounds + 1):
            for system, run in runs.items():
                seconds = turn(run)
                if i:
                    times[system].append(seconds)
    return times


def turn(run: Run) -> float:
    """The median of three seconds' runs without the first, or a run that takes longer.

    The first is up to twice as slow after another system's turn: its threads still spin, the caches are its own.
    """
    times: list[float] = []
    while sum(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def line(rows: list[dict[str, Any]]) -> str:
    cells = [f"{row['system']} {row['median']:6.1f} ({row['low']:.1f}-{row['high']:.1f})" for row in rows]
    return f"{rows[0]['model']}  {rows[0]['what']}  {rows[0]['case']:>8}   " + "   ".join(cells)


def machine(threads: int) -> dict[str, Any]:
    versions = {"jax": jax.__version__, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{threads} cores of {processor()}" if torch_device() == "cpu" else jax.devices()[0].device_kind,
        "threads": threads,
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
            axes.set_xticks(range(len(cases)), cases)
            axes.set_title(f"{name}, {what}")
    grid[0][0].legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
