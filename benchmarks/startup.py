"""Startup time, from the command to the first codes: `python -m benchmarks.startup`.

Times whole processes, as a user starts them:
- `snax encode` of three seconds of speech with the full-size 24 kHz architecture, and ten lines of torch that do the
  same. The first run has an empty compilation cache, the second run uses the cache of the first.
- `import snax`, and `import jax, flax.nnx`.
- `snax.load`, after the imports.

The processes take turns, and all files are in the page cache. Prints medians and ranges and writes
benchmarks/startup.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import snax
from benchmarks.speed import machine
from snax.codec.config import PUBLISHED_CONFIGS
from tests.helpers.recordings import DATA, clip
from tests.helpers.reference import converted, trained_like

HERE = Path(__file__).parent
CLIP = DATA / "speech_3s.wav"

# The same with torch and `snac`.
TORCH = """
import sys, numpy, soundfile, soxr, torch
from snac import SNAC

model = SNAC.from_pretrained(sys.argv[1]).eval()
samples, rate = soundfile.read(sys.argv[2], dtype="float32")
audio = torch.from_numpy(soxr.resample(samples, rate, model.sampling_rate))
with torch.inference_mode():
    codes = model.encode(audio[None, None])
numpy.savez(sys.argv[3], *(level.numpy() for level in codes))
"""

LOAD = """
import sys, time
import jax, jax.numpy, snax, orbax.checkpoint

jax.numpy.zeros(1).block_until_ready()
start = time.perf_counter()
jax.block_until_ready(jax.tree.leaves(snax.load(sys.argv[1])))
print(time.perf_counter() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each process (default: 5)")
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        runs = prepare(Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(rounds + 1):
            for name, run in runs.items():
                elapsed = run()
                if i:  # the first round loads all files into the page cache
                    seconds[name].append(elapsed)
    rows = {
        name: {"median": statistics.median(times), "low": min(times), "high": max(times)}
        for name, times in seconds.items()
    }
    for name, row in rows.items():
        print(f"{name:<28}{row['median']:6.2f} s ({row['low']:.2f}-{row['high']:.2f})")
    reference = rows["torch, encode"]["median"]
    for name in ("snax encode, first run", "snax encode, second run"):
        print(f"{name}: {rows[name]['median'] / reference:.2f} x torch")
    (HERE / "startup.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def prepare(folder: Path) -> dict[str, Callable[[], float]]:
    """Return a function for each row of the table. It runs the process and returns the seconds."""
    models = {name: write_model(name, folder) for name in ("snac_24khz", "snac_44khz")}
    torch_folder, orbax = models["snac_24khz"]
    cache = folder / "cache"
    encode = [str(Path(sys.executable).with_name("snax")), "encode", str(CLIP), "-m", str(orbax), "-o", str(folder)]

    def first_run() -> float:
        subprocess.run(["rm", "-rf", str(cache)], check=True)
        return second_run()

    def second_run() -> float:
        return whole_process([*encode, "--force"], XDG_CACHE_HOME=str(cache))

    def python(code: str, *arguments: Any) -> list[str]:
        return [sys.executable, "-c", code, *map(str, arguments)]

    def load(name: str) -> Callable[[], float]:
        command = python(LOAD, models[name][1])
        return lambda: float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    return {
        "torch, encode": lambda: whole_process(python(TORCH, torch_folder, CLIP, folder / "codes.npz")),
        "snax encode, first run": first_run,
        "snax encode, second run": second_run,
        "import jax, flax.nnx": lambda: whole_process(python("import jax, flax.nnx")),
        "import snax": lambda: whole_process(python("import snax")),
        "load snac_24khz": load("snac_24khz"),
        "load snac_44khz": load("snac_44khz"),
    }


def write_model(name: str, folder: Path) -> tuple[Path, Path]:
    """Write a model of the published architecture as a folder of the reference and as an Orbax directory."""
    config = PUBLISHED_CONFIGS[name]
    reference = trained_like(config.to_dict(), clip("speech_7s.wav", config.sampling_rate, 4))
    torch_folder, orbax = folder / f"{name}_torch", folder / name
    torch_folder.mkdir()
    (torch_folder / "config.json").write_text(json.dumps(config.to_dict()))
    torch.save(reference.state_dict(), torch_folder / "pytorch_model.bin")
    snax.save(converted(reference, config.to_dict()), orbax)
    return torch_folder, orbax


def whole_process(command: Sequence[str], **environment: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
