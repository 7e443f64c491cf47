"""Progress of an extraction: a progress bar or log lines, JSON events and the final totals."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from .store import COUNTS

_log = logging.getLogger(__name__)

# Seconds between log lines. Lines are only logged where there is no terminal for the progress bar.
LOG_INTERVAL_S = 10.0

Item = TypeVar("Item")


class Progress:
    """Counts of this process's share of the work, and the time that it spends waiting.

    Args:
        shards: number of shards that this process makes.
        clips: number of clips in them, or None if it is not known before the archives are read.
        rate: sampling rate of the model in Hz.
        report: called with a JSON-serializable event for each shard and one at the end.
    """

    def __init__(self, shards: int, clips: int | None, rate: int, report: Callable[[dict[str, Any]], None]):
        self._shards, self._rate, self._report = shards, rate, report
        self._start = self._last_line = time.perf_counter()
        self._totals = dict.fromkeys(("shards", *COUNTS, "quarantined"), 0)
        self._clip_blocks = self._computed_blocks = 0
        self._seconds = {"waiting for decoders": 0.0, "waiting for writes": 0.0, "decoding, in other processes": 0.0}
        first = jax.process_index() == 0
        self._bar = tqdm(total=clips, unit="clip", disable=None if first else True)
        self._log_lines = first and self._bar.disable

    @property
    def clips(self) -> int:
        """Number of clips in the shards made so far, including quarantined clips."""
        return self._totals["clips"]

    @property
    def quarantined(self) -> int:
        """Number of quarantined clips in the shards made so far."""
        return self._totals["quarantined"]

    def time_decoders(self, decoded: Iterable[Item]) -> Iterator[Item]:
        """Yield the items of `decoded` and record the time that each takes to arrive."""
        items = iter(decoded)
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._seconds["waiting for decoders"] += time.perf_counter() - start
            yield item

    def wait_for_write(self, write: Future[None]) -> None:
        """Wait for a write and record the waiting time."""
        start = time.perf_counter()
        write.result()
        self._seconds["waiting for writes"] += time.perf_counter() - start

    def add_clip(self, decoding_seconds: float) -> None:
        """Count a clip that a decoder has finished, readable or not."""
        self._seconds["decoding, in other processes"] += decoding_seconds
        self._bar.update()

    def add_shard(self, shard: int, sidecar: dict[str, Any], clip_blocks: int, computed_blocks: int) -> None:
        """Count a shard, the blocks (pad multiples) of its clips, and the blocks that were computed for them."""
        counts = {key: sidecar[key] for key in COUNTS} | {"quarantined": len(sidecar["quarantined"])}
        self._totals = {key: value + counts.get(key, 1) for key, value in self._totals.items()}
        self._clip_blocks += clip_blocks
        self._computed_blocks += computed_blocks
        self._report({"event": "shard", "shard": shard, **counts})
        done = self._totals["shards"]
        self._bar.set_postfix_str(f"shard {done} of {self._shards}, {self._speed:.1f} x real time")
        now = time.perf_counter()
        if self._log_lines and (now - self._last_line > LOG_INTERVAL_S or done == self._shards):
            self._last_line = now
            _log.info(
                "shard %d of %d, %.1f x real time, %.2f hours, %d of %d clips in quarantine",
                done,
                self._shards,
                self._speed,
                self._hours,
                self.quarantined,
                self.clips,
            )

    def finish(self, totals: dict[str, Any]) -> dict[str, Any]:
        """Report and return the totals of this process, with the `totals` of the whole extraction."""
        self._bar.close()
        event = {
            "event": "end",
            "process": jax.process_index(),
            **self._totals,
            "hours": round(self._hours, 4),
            "x_real_time": round(self._speed, 2),
            "packing_efficiency": round(self._clip_blocks / max(1, self._computed_blocks), 4),
            "seconds": {key: round(value, 2) for key, value in self._seconds.items()}
            | {"all": round(time.perf_counter() - self._start, 2)},
            "total": totals,
        }
        self._report(event)
        return event

    @property
    def _hours(self) -> float:
        return self._totals["samples"] / self._rate / 3600

    @property
    def _speed(self) -> float:
        return self._hours * 3600 / (time.perf_counter() - self._start)
