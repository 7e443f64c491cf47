"""Every way to run SNAC on this machine, side by side: `python -m benchmarks.speed`.

For each architecture and case the systems take turns, so that a slow minute of the machine slows all of them. Their
tokens are compared first. Prints a table of multiples of real time, writes benchmarks/speed.json and speed.png.
All draw the decoder's noise, as the reference does.
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

CASES = {"1 s": (1, 1), "10 s": (1, 10), "8 x 10 s": (8, 10), "60 s": (1, 60)}  # batch, seconds
ARCHITECTURES = ("snac_24khz", "snac_32khz")
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
    rows = []
    for name in ARCHITECTURES:
        config = PUBLISHED_CONFIGS[name]
        speech = clip("speech_7s.wav", config.sampling_rate, 7)
        reference = trained_like(config.to_dict(), speech[..., : 4 * config.sampling_rate])
        model = converted(reference, config.to_dict())
        for case, (batch, seconds) in CASES.items():
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
    plain = without_weight_norm(reference, model.config)
    torch_audio = torch.from_numpy(audio)
    with torch.inference_mode():
        torch_codes = reference.encode(torch_audio)
    codes = [level.numpy() for level in torch_codes]
    device_audio, device_codes = jax.device_put(audio), jax.device_put(codes)
    key = jax.random.key(0)
    compiled_encode, compiled_decode = torch.compile(Encode(reference)), torch.compile(Decode(reference))
    onnx_encode = onnx_session(Encode(plain), (torch_audio,), threads)
    onnx_decode = onnx_session(Decode(plain), tuple(torch_codes), threads)
    feeds = {value.name: level for value, level in zip(onnx_decode.get_inputs(), codes, strict=True)}
    encoders: dict[str, Run] = {
        "snax": lambda: jax.block_until_ready(model.encode(device_audio)),
        "torch": lambda: reference.encode(torch_audio),
        "torch.compile": lambda: compiled_encode(torch_audio),
        "ONNX Runtime": lambda: onnx_encode.run(None, {onnx_encode.get_inputs()[0].name: audio}),
    }
    decoders: dict[str, Run] = {
        "snax": lambda: jax.block_until_ready(model.decode(device_codes, key=key)),
        "torch": lambda: reference.decode(torch_codes),
        "torch.compile": lambda: compiled_decode(*torch_codes),
        "ONNX Runtime": lambda: onnx_decode.run(None, feeds),
    }
    for system, encode in encoders.items():
        with torch.inference_mode():
            equal = [float((np.asarray(ours) == level).mean()) for ours, level in zip(encode(), codes, strict=True)]
        # One in a thousand may be a near tie that another order of float32 sums decides.
        if min(equal) < 0.999:
            raise SystemExit(f"{system} does not give the reference's tokens: {equal} are equal, by level")
    return encoders, decoders


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
    """Seconds of each run, round by round; a first round warms up."""
    times: dict[str, list[float]] = {system: [] for system in runs}
    with torch.inference_mode():
        for i in range(rounds + 1):
            for system, run in runs.items():
                start = time.perf_counter()
                run()
                if i:
                    times[system].append(time.perf_counter() - start)
    return times


def line(rows: list[dict[str, Any]]) -> str:
    cells = [f"{row['system']} {row['median']:6.1f} ({row['low']:.1f}-{row['high']:.1f})" for row in rows]
    return f"{rows[0]['model']}  {rows[0]['what']}  {rows[0]['case']:>8}   " + "   ".join(cells)


def machine(threads: int) -> dict[str, Any]:
    versions = {"jax": jax.__version__, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": platform.machine(),
        "device": jax.devices()[0].device_kind,
        "threads": threads,
        **versions,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    rows, machine = results["rows"], results["machine"]
    figure, grid = plt.subplots(len(ARCHITECTURES), 2, figsize=(11, 3.2 * len(ARCHITECTURES)), layout="constrained")
    figure.suptitle(f"times real time, float32, {machine['device']} with {machine['threads']} threads")
    for line_of_axes, name in zip(grid, ARCHITECTURES, strict=True):
        for axes, what in zip(line_of_axes, ("encode", "decode"), strict=True):
            chosen = [row for row in rows if row["model"] == name and row["what"] == what]
            names = list(dict.fromkeys(row["system"] for row in chosen))
            for i, system in enumerate(names):
                medians = [row["median"] for row in chosen if row["system"] == system]
                axes.bar(np.arange(len(CASES)) + 0.2 * (i - 1.5), medians, 0.2, label=system)
            axes.set_xticks(range(len(CASES)), CASES)
            axes.set_title(f"{name}, {what}")
    grid[0][0].legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
