"""Progress of an extraction: a progress bar or log lines, JSON events and the final totals."""

import logging
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tqdm import tqdm

from .store import COUNTS

_log = logging.getLogger(__name__)

# Seconds between log lines. Lines are only logged where there is no terminal for the progress bar.
LOG_INTERVAL_S = 10.0

# What a worker waits for, and the time of its decoders.
SECONDS = ("waiting for decoders", "waiting for writes", "decoding, in other processes")


class Made(NamedTuple):
    """A committed shard.

    Attributes:
        shard: its index in the plan.
        counts: the counts of its sidecar, and `"quarantined"`.
        clip_blocks: blocks (pad multiples) in its clips.
        computed_blocks: blocks that were computed for them in packed rows.
        seconds: for each of `SECONDS`, the seconds since the shard before it.
    """

    shard: int
    counts: dict[str, int]
    clip_blocks: int
    computed_blocks: int
    seconds: dict[str, float]


class Progress:
    """Totals of the shards that a run makes.

    Args:
        shards: number of shards to make.
        clips: number of clips in them, or None if it is not known before the archives are read.
        rate: sampling rate of the model in Hz.
        report: called with a JSON-serializable event for each shard and one at the end.
        process: index of this process in a distributed job. Only process 0 shows progress.
    """

    def __init__(
        self,
        shards: int,
        clips: int | None,
        rate: int,
        report: Callable[[dict[str, Any]], None],
        process: int = 0,
    ):
        self._shards, self._rate, self._report, self._process = shards, rate, report, process
        self._start = self._last_line = time.perf_counter()
        self._totals = dict.fromkeys(("shards", *COUNTS, "quarantined"), 0)
        self._clip_blocks = self._computed_blocks = 0
        self._seconds = dict.fromkeys(SECONDS, 0.0)
        self._bar = tqdm(total=clips, unit="clip", disable=None if process == 0 else True)
        self._log_lines = process == 0 and self._bar.disable

    @property
    def seen(self) -> dict[str, int]:
        """Number of clips in the shards made so far, and how many of them are in quarantine."""
        return {name: self._totals[name] for name in ("clips", "quarantined")}

    def add_clips(self, count: int = 1) -> None:
        """Move the progress bar."""
        self._bar.update(count)

    def add_shard(self, made: Made) -> None:
        """Count a committed shard."""
        self._totals = {key: value + made.counts.get(key, 1) for key, value in self._totals.items()}
        self._clip_blocks += made.clip_blocks
        self._computed_blocks += made.computed_blocks
        self._seconds = {key: value + made.seconds.get(key, 0.0) for key, value in self._seconds.items()}
        self._report({"event": "shard", "shard": made.shard, **made.counts})
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
                self._totals["quarantined"],
                self._totals["clips"],
            )

    def finish(self, totals: dict[str, Any]) -> dict[str, Any]:
        """Report and return the totals of this run, with the `totals` of the whole extraction."""
        self._bar.close()
        event = {
            "event": "end",
            "process": self._process,
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
