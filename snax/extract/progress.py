"""What a run says of itself: a bar or lines for people, events for machines, the sums at the end."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from .store import SUMS

# Seconds from one line to the next where there is no terminal.
BETWEEN_LINES = 10.0

Item = TypeVar("Item")


class Progress:
    """Counts this process's part of the work, and where its time goes.

    Args:
        shards: how many this process is to make.
        clips: how many are in them, if that is known.
        rate: of the model.
        report: told of every shard, and of the end.
    """

    def __init__(self, shards: int, clips: int | None, rate: int, report: Callable[[dict[str, Any]], None]):
        self._shards, self._rate, self._report = shards, rate, report
        self._begin = self._last_line = time.perf_counter()
        self._sums = dict.fromkeys(("shards", *SUMS, "quarantined"), 0)
        self._frames = {"asked": 0, "computed": 0}
        self._seconds = {"waiting for decoders": 0.0, "waiting for writes": 0.0, "decoding, in other processes": 0.0}
        first = jax.process_index() == 0
        self._bar = tqdm(total=clips, unit="clip", disable=None if first else True)
        self._lines = first and self._bar.disable

    @property
    def clips(self) -> int:
        """Clips so far, and in `quarantined` those of them that can't be read."""
        return self._sums["clips"]

    @property
    def quarantined(self) -> int:
        return self._sums["quarantined"]

    def while_waiting(self, decoded: Iterable[Item]) -> Iterator[Item]:
        """The items of `decoded`; the time that they take is time that decoders are behind."""
        items = iter(decoded)
        while True:
            begin = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._seconds["waiting for decoders"] += time.perf_counter() - begin
            yield item

    def while_writing(self, write: Future[None]) -> None:
        """Waits for a write."""
        begin = time.perf_counter()
        write.result()
        self._seconds["waiting for writes"] += time.perf_counter() - begin

    def clip(self, decoding_seconds: float) -> None:
        """One more clip has come from the decoders."""
        self._seconds["decoding, in other processes"] += decoding_seconds
        self._bar.update()

    def shard(self, shard: int, sidecar: dict[str, Any], asked: int, computed: int) -> None:
        """A shard is made, in which `asked` of `computed` latent frames were those of clips."""
        said = {key: sidecar[key] for key in SUMS} | {"quarantined": len(sidecar["quarantined"])}
        self._sums = {key: value + said.get(key, 1) for key, value in self._sums.items()}
        self._frames["asked"] += asked
        self._frames["computed"] += computed
        self._report({"event": "shard", "shard": shard, **said})
        line = f"shard {self._sums['shards']} of {self._shards}, {self._speed:.1f} x real time"
        self._bar.set_postfix_str(line)
        now = time.perf_counter()
        if self._lines and (now - self._last_line > BETWEEN_LINES or self._sums["shards"] == self._shards):
            self._last_line = now
            bad = f"{self.quarantined} of {self.clips} clips in quarantine"
            print(f"snax: {line}, {self._hours:.2f} hours, {bad}", file=sys.stderr, flush=True)

    def end(self, totals: dict[str, Any]) -> dict[str, Any]:
        """The sums of this process, with those of the whole job so far."""
        self._bar.close()
        event = {
            "event": "end",
            "process": jax.process_index(),
            **self._sums,
            "hours": round(self._hours, 4),
            "x_real_time": round(self._speed, 2),
            "packing_efficiency": round(self._frames["asked"] / max(1, self._frames["computed"]), 4),
            "seconds": {key: round(value, 2) for key, value in self._seconds.items()}
            | {"all": round(time.perf_counter() - self._begin, 2)},
            "total": totals,
        }
        self._report(event)
        return event

    @property
    def _hours(self) -> float:
        return self._sums["samples"] / self._rate / 3600

    @property
    def _speed(self) -> float:
        return self._hours * 3600 / (time.perf_counter() - self._begin)
