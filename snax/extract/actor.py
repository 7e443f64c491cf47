"""The Ray actor that makes shards."""

import contextlib
import os
import queue
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

import ray
from ray.util import metrics

from .config import ExtractConfig
from .progress import Made
from .store import Store

# Shards that a worker has at the same time. With two of them, its decoders work ahead.
SHARDS_IN_FLIGHT = 2

# libtpu's bounds of a host that works alone, by its number of chips.
_TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


class ExtractWorker:
    """Makes shards on the devices that Ray has assigned to it.

    Args:
        config: the configuration of the extraction.
        folder: the working directory of the driver, for relative paths.
    """

    def __init__(self, config: ExtractConfig, folder: str):
        self._config, self._folder = config, folder
        self._shards: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self._results: dict[int, Future[Made]] = {}
        self._lock = threading.Lock()
        self._worker: Any = None

    def start(self) -> dict[str, Any]:
        """Load the model. Returns what the bytes of the shards depend on, other than the inputs."""
        # A node may lack the folder if all paths are URLs or absolute.
        with contextlib.suppress(FileNotFoundError):
            os.chdir(self._folder)
        resources = ray.get_runtime_context().get_assigned_resources()
        cpus = int(resources["CPU"])
        os.environ["NPROC"] = str(cpus)  # XLA's threads. Ray does not limit a worker to its cores
        os.environ.update(isolated_tpu_host(int(resources.get("TPU", 0))))
        # Python would wait at exit for the thread that waits for the next shard. Commits are atomic, so exit at once.
        threading._register_atexit(os._exit, 0)  # type: ignore[attr-defined]  # concurrent.futures uses it as well
        from .. import compilation_cache
        from ..weights import pretrained
        from .worker import Worker

        compilation_cache.enable()
        worker = Worker(pretrained.load(self._config.model), self._config, self._config.num_decoders or min(16, cpus))
        self._worker = worker
        return worker.description

    def make(self, shard: int, attempt: int, seen: dict[str, int]) -> Made:
        """Make a shard. Returns when it is committed."""
        with self._lock:
            if not self._results:
                threading.Thread(target=self._run, daemon=True).start()
            self._worker.seen = Counter(seen)
            result = self._results[shard] = Future[Made]()
        self._shards.put((shard, attempt))
        return result.result()

    def _run(self) -> None:
        """Make shards until the process ends."""
        try:
            dashboard = _Dashboard(self._worker.description["sampling_rate"])

            def on_commit(made: Made) -> None:
                dashboard.add(made)
                self._results[made.shard].set_result(made)

            plan = Store(self._config.out).join(self._worker.made_with)
            self._worker.make(plan, iter(self._shards.get, None), on_commit, on_error=self._fail)
        except BaseException as error:
            for shard in self._results:
                self._fail(shard, error)

    def _fail(self, shard: int, error: BaseException) -> None:
        if not self._results[shard].done():
            self._results[shard].set_exception(error)


class _Dashboard:
    """A worker's metrics on Ray's dashboard, and for Prometheus. Without `ray[default]` nothing collects them."""

    def __init__(self, rate: int):
        self._rate, self._last = rate, time.perf_counter()
        tags = {"worker": str(ray.get_runtime_context().get_actor_name())}
        self._clips = metrics.Counter("snax_clips", "Clips in committed shards.", tuple(tags))
        self._hours = metrics.Counter("snax_hours", "Hours of audio in committed shards.", tuple(tags))
        self._speed = metrics.Gauge("snax_x_real_time", "Speed of the last shard.", tuple(tags))
        for metric in (self._clips, self._hours, self._speed):
            metric.set_default_tags(tags)

    def add(self, made: Made) -> None:
        """Count a committed shard."""
        seconds, now = made.counts["samples"] / self._rate, time.perf_counter()
        # Counters reject 0. A shard has no audio if all its clips are in quarantine.
        if made.counts["clips"]:
            self._clips.inc(made.counts["clips"])
        if seconds:
            self._hours.inc(seconds / 3600)
            self._speed.set(seconds / (now - self._last))
        self._last = now


def isolated_tpu_host(chips: int) -> dict[str, str]:
    """Return the environment in which libtpu uses the chips of this host without waiting for the rest of its slice.

    Ray sets a part of it, but not for an actor that has all chips of its host. No effect without chips.
    """
    if chips not in _TPU_BOUNDS:
        return {}
    return {
        "CLOUD_TPU_TASK_ID": "0",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_BOUNDS[chips],
        "TPU_VISIBLE_CHIPS": ",".join(map(str, range(chips))),
    }
