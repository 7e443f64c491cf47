"""Make shards on a Ray cluster. Workers come and go; the driver hands out shards and touches no device.

A worker takes two shards at a time, so that its decoders can work ahead. Audio and codes do not pass through Ray. When
a worker is lost, the store tells which of its shards are committed, and the others are handed out again. Ray restarts
the worker where there is room. https://docs.ray.io/en/latest/ray-core/actors.html
"""

import hashlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import NodeDiedError, RayActorError, RayTaskError, WorkerCrashedError

from ..data import corpus
from .actor import SHARDS_IN_FLIGHT, ExtractWorker
from .config import ExtractConfig, RayOptions
from .progress import Made, Progress
from .store import COUNTS, PLAN, SUCCESS, Store

_log = logging.getLogger(__name__)

MAX_LOSSES = 3  # of one shard's worker
RESTART_S = 1.0  # between attempts to start a worker
# A run that has just been killed may still hold the names of its workers.
NAME_TIMEOUT_S = 30.0

_LOST = (RayActorError, WorkerCrashedError, NodeDiedError)


class ClusterError(ValueError):
    """The cluster cannot run the extraction."""


class LostShardError(RuntimeError):
    """A shard lost its worker several times, so it probably kills its workers."""


def extract(
    config: ExtractConfig, options: RayOptions, report: Callable[[dict[str, Any]], None] = lambda event: None
) -> dict[str, Any]:
    """Encode a corpus into token shards on a Ray cluster. The shards are those of `snax.extract.run.extract`.

    Args:
        config: the inputs, the output directory and the options.
        options: the workers.
        report: called with a JSON-serializable event for each committed shard, and with the result at the end.

    Returns:
        The totals of this run. `"total"` holds the totals of the whole extraction.

    Raises:
        ClusterError: if no worker can be used, or another extraction into this directory runs on the cluster.
        LostShardError: if a shard loses its worker three times.
        ValueError, OSError: as in `snax.extract.run.extract`, from the driver or from a worker.
    """
    ray.init(address=options.ray_address, namespace="snax", log_to_driver=False, logging_level=logging.WARNING)
    try:
        return _Driver(config, options, report).run()
    except RayTaskError as error:  # a worker's own error
        raise error.cause from None
    finally:
        ray.shutdown()


class _Driver:
    """Hands out the shards of a plan, and gives out those of a lost worker again."""

    def __init__(self, config: ExtractConfig, options: RayOptions, report: Callable[[dict[str, Any]], None]):
        self._config, self._options, self._report = config, options, report
        self._store = Store(config.out)
        self._workers: dict[str, Any] = {}
        # The calls that run: the worker, and the shard that it makes or None if it starts.
        self._calls: dict[ObjectRef[Any], tuple[str, int | None]] = {}
        # The workers that have started, each with the shards that it makes.
        self._in_flight: dict[str, set[int]] = {}
        # The workers that were lost while they started, each with the time to try again.
        self._start_at: dict[str, float] = {}
        self._todo: deque[int] = deque()
        self._losses: Counter[int] = Counter()

    def run(self) -> dict[str, Any]:
        shards = corpus.plan(self._config.inputs, self._config.clips_per_shard)
        self._create_workers()
        description = self._wait_for_first_worker()
        job, rate = description | {"plan": corpus.digest(shards)}, description["sampling_rate"]
        self._store.begin(shards, job)
        attempts = self._store.attempts(range(len(shards)), len(shards), retry=self._config.retry_quarantined)
        clips = corpus.count_clips([shards[shard] for shard in attempts])
        progress = Progress(len(attempts), clips, rate, self._report)
        if attempts:
            self._store.remove(SUCCESS)
            self._todo.extend(attempts)
            self._assign(attempts, progress)
            while self._todo or any(self._in_flight.values()):
                self._handle_next(len(shards), description, progress)
                self._assign(attempts, progress)
        return progress.finish(self._store.finish(shards, rate))

    def _create_workers(self) -> None:
        options = dict(
            **_resources(self._options),
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=SHARDS_IN_FLIGHT + 1,
            scheduling_strategy="SPREAD",
        )
        actor = ray.remote(ExtractWorker)
        job, deadline = hashlib.sha256(self._store.url.encode()).hexdigest()[:8], time.monotonic() + NAME_TIMEOUT_S
        while len(self._workers) < self._options.workers:
            name = f"snax-{job}-{len(self._workers)}"
            try:
                self._workers[name] = actor.options(name=name, **options).remote(self._config, os.getcwd())
            except ValueError as error:  # the name is taken
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"Another extraction into {self._store.url} runs on this Ray cluster. Wait for it, or stop it."
                    ) from error
                time.sleep(1)
            else:
                self._start(name)

    def _start(self, name: str) -> None:
        self._calls[self._workers[name].start.remote()] = name, None

    def _wait_for_first_worker(self) -> dict[str, Any]:
        """Wait until a worker has loaded the model. Return what its shards depend on."""
        while True:
            call = self._wait()
            name, _ = self._calls.pop(call)
            try:
                description: dict[str, Any] = ray.get(call)
            except _LOST as error:
                self._restart(name, error)
            else:
                self._in_flight[name] = set()
                return description

    def _handle_next(self, count: int, expected: dict[str, Any], progress: Progress) -> None:
        """Wait until a call ends. `count` is the number of shards, and `expected` the description of every worker."""
        call = self._wait()
        name, shard = self._calls.pop(call)
        try:
            result = ray.get(call)
        except _LOST as error:
            self._calls = {call: running for call, running in self._calls.items() if running[0] != name}
            lost = self._in_flight.get(name, set())
            self._restart(name, error)
            for lost_shard in sorted(lost, reverse=True):
                self._recover(lost_shard, count, progress)
            return
        if shard is not None:
            self._in_flight[name].remove(shard)
            progress.add_clips(result.counts["clips"])
            progress.add_shard(result)
        elif result == expected:
            self._in_flight[name] = set()
        else:
            self._refuse(name, result, expected)

    def _wait(self) -> "ObjectRef[Any]":  # a string, because Ray 2.49 cannot subscript it
        """Return the next call that ends. Meanwhile, start the workers whose time has come."""
        while True:
            for name in [name for name, start in self._start_at.items() if start <= time.monotonic()]:
                del self._start_at[name]
                self._start(name)
            ready, _ = ray.wait(list(self._calls), timeout=RESTART_S) if self._calls else ([], [])
            if ready:
                return ready[0]
            if not self._calls:
                time.sleep(RESTART_S)

    def _restart(self, name: str, error: Exception) -> None:
        """Wait for a lost worker, which Ray restarts where there is room."""
        if getattr(error, "actor_init_failed", False):
            raise ClusterError(
                f"{name} cannot be created. Is the same version of snax installed on all nodes? {error}"
            ) from error
        if name in self._in_flight:
            _log.warning("%s was lost and will be restarted where there is room: %s", name, _first_line(error))
            del self._in_flight[name]
            self._start(name)
        else:  # lost while it started. A call to a worker that is not back yet fails at once
            self._start_at[name] = time.monotonic() + RESTART_S

    def _assign(self, attempts: dict[int, int], progress: Progress) -> None:
        """Give shards to all workers that have started and can take more."""
        for name, own in self._in_flight.items():
            while self._todo and self._can_take(own, self._todo[0]):
                shard = self._todo.popleft()
                own.add(shard)
                call = self._workers[name].make.remote(shard, attempts[shard], progress.seen)
                self._calls[call] = name, shard

    def _can_take(self, own: set[int], shard: int) -> bool:
        """A shard that has lost its worker is made alone, so that no other one is blamed if it happens again."""
        return len(own) < SHARDS_IN_FLIGHT and not (own and any(self._losses[x] for x in [shard, *own]))

    def _recover(self, shard: int, count: int, progress: Progress) -> None:
        """Put a shard whose worker was lost back into the queue, unless it is committed."""
        (sidecar,) = self._store.sidecars([shard])
        if sidecar is not None and self._store.is_whole(shard, count, sidecar):
            counts = {key: sidecar[key] for key in COUNTS} | {"quarantined": len(sidecar["quarantined"])}
            progress.add_clips(counts["clips"])
            progress.add_shard(Made(shard, counts, 0, 0, {}))
            return
        self._losses[shard] += 1
        if self._losses[shard] == MAX_LOSSES:
            raise LostShardError(
                f"Shard {shard} lost its worker {MAX_LOSSES} times. Its clips are listed in {self._store.url}/{PLAN}. "
                "Find the clip that kills the worker, for example with this shard's clips as the only input, and leave "
                "it out."
            )
        self._todo.appendleft(shard)

    def _refuse(self, name: str, description: dict[str, Any], expected: dict[str, Any]) -> None:
        """Stop using a worker whose shards would differ from those of the others."""
        differing = [
            f"{key} {description.get(key)!r} instead of {value!r}"
            for key, value in expected.items()
            if description.get(key) != value
        ]
        _log.error("%s is not used, because its shards would differ: %s", name, ", ".join(differing))
        ray.kill(self._workers.pop(name))
        if not self._workers:
            raise ClusterError("No worker is left. Use the same hardware and versions on all nodes.")


def _resources(options: RayOptions) -> dict[str, Any]:
    """Return the resources of a worker: a GPU, the TPU chips of a host, or cores."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = any("GPU" in node for node in nodes)
    chips = max((node.get("TPU", 0) for node in nodes), default=0)
    cores = [node.get("CPU", 0) // max(1, node.get("GPU", 0)) for node in nodes if not gpus or "GPU" in node]
    share = sum(node.get("CPU", 0) for node in nodes) // options.workers
    cpus = options.worker_cpus or max(1, int(min(share, *cores)))
    return {"num_cpus": cpus, "num_gpus": int(gpus), "resources": {"TPU": chips} if chips else {}}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
