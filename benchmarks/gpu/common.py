"""Models, processes and results that the blocks share."""

import datetime
import functools
import json
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import snac
import torch

import snax
from snax.codec.config import PUBLISHED_CONFIGS
from snax.weights.torch_weights import from_torch
from tests.helpers.recordings import clip
from tests.helpers.reference import numpy_state_dict, trained_like

RESULTS = Path(__file__).parents[1] / "gpu.json"
NAMES = ("snac_24khz", "snac_32khz")


def save(block: str, result: Any) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[block] = {"machine": machine()} | result
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


@functools.cache
def machine() -> dict[str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    card, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    versions = {"jax": jax.__version__, "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return {"date": datetime.date.today().isoformat(), "card": card, "driver": driver, **versions}


def draw_weights(folder: Path, name: str) -> None:
    config = PUBLISHED_CONFIGS[name]
    speech = clip("speech_7s.wav", config.sampling_rate, 4)
    torch.save(trained_like(config.to_dict(), speech).state_dict(), folder / f"{name}.pt")


def torch_model(folder: Path, name: str) -> snac.SNAC:
    model = snac.SNAC(**PUBLISHED_CONFIGS[name].to_dict()).eval()
    model.load_state_dict(torch.load(folder / f"{name}.pt"))
    return model


def snax_model(folder: Path, name: str, precision: str = "highest") -> snax.SNAC:
    state_dict = numpy_state_dict(torch_model(folder, name))
    return jax.device_put(from_torch(state_dict, PUBLISHED_CONFIGS[name], precision=precision))


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` in a process of its own, which frees its GPU memory afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def median_seconds(run: Callable[[], Any]) -> float:
    """Return the median time of at least four runs and at least 0.3 s, after one warm-up run."""
    run()
    times: list[float] = []
    while sum(times) < 0.3 or len(times) < 4:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_gib() -> float:
    """Return the peak of GPU memory that JAX used in this process."""
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30
