"""Extraction on Ray: `python -m benchmarks.cluster`. Writes benchmarks/cluster.json.

One worker on all cores, beside `snax extract` in one process. They take turns on the same corpus, with the snac_24khz
architecture in float32. The speed is that from the first committed shard to the last.

Then what one driver can feed: workers that commit shards without encoding anything. All of them share this machine's
cores, so the driver's CPU time per shard matters, not the shards per second. Takes about 15 minutes.
"""

import importlib
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from flax import nnx
from ray.cluster_utils import Cluster

import snax
from benchmarks.many import clips
from benchmarks.speed import machine
from snax.codec.config import PUBLISHED_CONFIGS
from snax.extract import cluster, run
from snax.extract.actor import ExtractWorker
from snax.extract.config import ExtractConfig, RayOptions
from snax.extract.progress import Made
from snax.extract.store import Store

HERE = Path(__file__).parent
SECONDS, RATE, ROUNDS, CLIPS_PER_SHARD = 1200, 44_100, 3, 12
WORKERS = (1, 16, 64, 256)
SHARDS_PER_WORKER, MIN_SHARDS = 16, 256


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        one_worker = compare_one_worker(Path(folder))
        driver = [in_process(simulate, Path(folder), workers) for workers in WORKERS]
    result = {"machine": machine(), "one worker": one_worker, "driver": driver}
    (HERE / "cluster.json").write_text(json.dumps(result, indent=1) + "\n")


def compare_one_worker(folder: Path) -> dict[str, Any]:
    """Return the speeds of both ways as multiples of real time, and their ratio."""
    model = snax.SNAC(PUBLISHED_CONFIGS["snac_24khz"], rngs=nnx.Rngs(0))
    snax.save(model, folder / "model")
    corpus, cores = folder / "corpus", len(os.sched_getaffinity(0))
    corpus.mkdir()
    for i, clip in enumerate(clips(RATE, SECONDS)):
        soundfile.write(corpus / f"{i:04}.flac", clip, RATE)
    speeds: dict[str, list[float]] = {"in process": [], "one Ray worker": []}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": cores})
    options = RayOptions(workers=1, ray_address=nodes.address)
    for number in range(ROUNDS):
        for way in speeds:
            commits: list[tuple[float, int]] = []

            def report(event: dict[str, Any], commits: list[tuple[float, int]] = commits) -> None:
                if event["event"] == "shard":
                    commits.append((time.perf_counter(), event["samples"]))

            config = ExtractConfig(
                [str(corpus)],
                out=str(folder / f"{way} {number}"),
                model=str(folder / "model"),
                clips_per_shard=CLIPS_PER_SHARD,
            )
            if way == "in process":
                run.extract(model, config, report)
            else:
                cluster.extract(config, options, report)
            seconds = sum(samples for _, samples in commits[1:]) / model.config.sampling_rate
            speeds[way].append(seconds / (commits[-1][0] - commits[0][0]))
            print(f"{way}: {speeds[way][-1]:.1f} x real time", flush=True)
    nodes.shutdown()
    medians = {way: statistics.median(values) for way, values in speeds.items()}
    return {"x real time": speeds, "ratio": medians["one Ray worker"] / medians["in process"]}


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` in a process of its own, so that its memory is that of the driver."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


class IdleWorker(ExtractWorker):
    """Commits empty shards."""

    def start(self) -> dict[str, Any]:
        return {"sampling_rate": 24_000}

    def make(self, shard: int, attempt: int, seen: dict[str, int]) -> Made:
        counts = {"clips": 1, "committed": 1, "rows": 1, "samples": 24_000, "tokens": 84}
        sidecar = counts | {"attempt": attempt, "quarantined": []}
        Store(self._config.out).commit(shard, int(os.environ["SHARDS"]), b"", sidecar)
        return Made(shard, counts | {"quarantined": 0}, 0, 0, {})


def simulate(folder: Path, workers: int) -> dict[str, Any]:
    """Return how fast the driver hands out shards to so many idle workers, its CPU time for each, and its memory."""
    shards = max(MIN_SHARDS, SHARDS_PER_WORKER * workers)
    corpus = folder / f"clips of {workers}"
    corpus.mkdir()
    soundfile.write(corpus / "00000.wav", np.zeros(100), 24_000)
    for i in range(1, shards):
        os.link(corpus / "00000.wav", corpus / f"{i:05}.wav")
    os.environ["SHARDS"] = str(shards)
    os.environ["PYTHONPATH"] = str(HERE.parent)  # for the class of the workers
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": workers})
    # The class that Ray's workers can import. In this process the module is `__mp_main__`.
    cluster.ExtractWorker = importlib.import_module("benchmarks.cluster").IdleWorker
    config = ExtractConfig([str(corpus)], out=str(folder / f"out of {workers}"), clips_per_shard=1)
    times: list[tuple[float, float]] = []  # wall and CPU at each commit
    options = RayOptions(workers=workers, ray_address=nodes.address, worker_cpus=1)
    cluster.extract(config, options, lambda event: times.append((time.perf_counter(), time.process_time())))
    nodes.shutdown()
    half = len(times) // 2  # all workers have started by then
    wall, cpu = (last - first for first, last in zip(times[half], times[-2], strict=True))
    result = {
        "workers": workers,
        "shards": shards,
        "shards per second": (len(times) - 2 - half) / wall,
        "driver CPU ms per shard": 1e3 * cpu / (len(times) - 2 - half),
        "driver MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(result), flush=True)
    return result


if __name__ == "__main__":
    main()
