"""The job: this process's shards, one after the other, from clips to codes to a committed table."""

import dataclasses
import importlib.metadata
import itertools
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import soundfile
import soxr
from jax.sharding import Mesh

from .. import distributed
from ..codec.model import SNAC
from ..data import audio, corpus
from ..data.decoding import Decoded, DecoderPool
from ..data.reading import Clip, Content, Unreadable, clips
from ..inference.packing import ROW_CONTEXTS, EncodedClip, computed_blocks, encode_many
from ..weights.checkpoint import fingerprint
from .progress import Progress
from .store import SUCCESS, Store
from .table import Row, to_parquet, token_layout

# Shards that are computed but not yet written.
WRITES_AHEAD = 2


class TooManyUnreadableError(ValueError):
    """So many clips can't be read that something else must be wrong."""


@dataclasses.dataclass(frozen=True)
class ExtractConfig:
    """The configuration of an extraction.

    Args:
        inputs: see `snax.data.corpus.plan`.
        out: a folder, or a URL of fsspec.
        model: what the model is called in the shards.
        clips_per_shard: at most. A shard is what is lost when the run is stopped.
        separate: a row for each channel, instead of their mean.
        tokens: adds a column of a language model's tokens: "orpheus" for its ids, "shared" for ids from 0 that all
            slots of a group share, "separate" for ids from 0 with a codebook's worth for each slot.
        max_seconds: longer clips go into quarantine.
        max_quarantined: the fraction of clips in quarantine (and more than ten) at which the run stops.
        retry_quarantined: makes the shards anew that have clips in quarantine.
        num_workers: processes that read and decode. Default: one for each core that this process may use, at most 16,
            since one decodes at some 1000 times real time.
    """

    inputs: Sequence[str]
    out: str
    model: str
    clips_per_shard: int = 1000
    separate: bool = False
    tokens: str | None = None
    max_seconds: float = audio.MAX_SECONDS
    max_quarantined: float = 0.1
    retry_quarantined: bool = False
    num_workers: int | None = None


def extract(
    model: SNAC, config: ExtractConfig, report: Callable[[dict[str, Any]], None] = lambda event: None
) -> dict[str, Any]:
    """Makes the shards of a corpus that are not there yet, with all local devices and, in a cluster, all hosts.

    The bytes of the shards depend on the inputs, the configuration and the model alone, not on the number of processes
    and devices, nor on how often they are stopped.

    Args:
        report: told of each shard that is committed, and at the end of the sums.

    Returns:
        The sums over this process's part, and over all processes `total`.

    Raises:
        ValueError: for inputs or a folder that can't be used, codes that the tokens can't hold; when too many clips
            can't be read.
        OSError: for what can't be read or written for no fault of a clip's.
    """
    if model.config.codebook_size > 2**16:
        raise ValueError(f"shards have codes of 16 bits; this model has {model.config.codebook_size} in a codebook.")
    if config.tokens is not None:
        token_layout(config.tokens, model.config)  # which may not fit
    store = Store(config.out)
    if jax.process_index() == 0:
        shards = corpus.plan(config.inputs, config.clips_per_shard)
        store.begin(shards, _made_with(model, config, shards))
        distributed.barrier("planned")
    else:
        distributed.barrier("planned")
        shards = store.join(lambda shards: _made_with(model, config, shards))
    attempts = _attempts(store, shards, retry=config.retry_quarantined)
    sources = [source for shard in attempts for source in shards[shard]]
    known = None if any(source.kind == "tar" for source in sources) else sum(map(corpus.planned_clips, sources))
    progress = Progress(len(attempts), known, model.config.sampling_rate, report)
    if attempts:
        store.remove(SUCCESS)
        _make_shards(model, config, store, shards, attempts, progress)
    distributed.barrier("committed")
    totals = store.finish(shards, model.config.sampling_rate) if jax.process_index() == 0 else {}
    distributed.barrier("finished")
    return progress.end(totals)


def _made_with(model: SNAC, config: ExtractConfig, shards: list[list[corpus.Source]]) -> dict[str, Any]:
    """All that the bytes of the shards depend on."""
    return {
        "format": 1,
        "snax": _version("snax-codec"),
        "model": config.model,
        "fingerprint": fingerprint(model),
        "sampling_rate": model.config.sampling_rate,
        "vq_strides": list(model.config.vq_strides),
        "codebook_size": model.config.codebook_size,
        "libsndfile": soundfile.__libsndfile_version__,
        "av": _version("av"),
        "resampler": f"soxr {soxr.__version__} HQ",
        "row_contexts": ROW_CONTEXTS,
        "channels": "separate" if config.separate else "mix",
        "tokens": config.tokens,
        "max_seconds": config.max_seconds,
        "plan": corpus.digest(shards),
    }


def _attempts(store: Store, shards: list[list[corpus.Source]], *, retry: bool) -> dict[int, int]:
    """This process's shards that are still to be made, and how often that will then have been tried."""
    attempts = {}
    ours = range(jax.process_index(), len(shards), jax.process_count())
    for shard, sidecar in zip(ours, store.sidecars(ours), strict=True):
        if sidecar is None:
            attempts[shard] = 1
        elif not store.is_whole(shard, len(shards), sidecar):
            print(f"snax: shard {shard} is not what its sidecar says: it is made again.", file=sys.stderr)
            attempts[shard] = sidecar["attempt"] + 1
        elif retry and sidecar["quarantined"]:
            attempts[shard] = sidecar["attempt"] + 1
    return attempts


def _make_shards(
    model: SNAC,
    config: ExtractConfig,
    store: Store,
    shards: list[list[corpus.Source]],
    attempts: dict[int, int],
    progress: Progress,
) -> None:
    mesh = Mesh(np.array(jax.local_devices()), ("rows",))
    made_with = _made_with(model, config, shards)
    decoders = DecoderPool(
        config.num_workers or min(16, _cores()),
        model.config.sampling_rate,
        separate=config.separate,
        max_seconds=config.max_seconds,
    )
    writer, writes = ThreadPoolExecutor(1, "writer"), deque[Future[None]]()
    read: Counter[int] = Counter()
    try:
        decoded = progress.while_waiting(decoders.map(_contents(shards, attempts, read)))
        for shard, attempt in attempts.items():
            made = _Shard(attempt, progress)
            # Decoding is ahead, maybe in the next shard; rows of the codec are not: they depend on this shard alone.
            for codes in encode_many(model, made.audio(_of_one_shard(decoded)), mesh=mesh):
                made.take(codes)
            sidecar = made.sidecar(read[shard]) | {"made_with": made_with}
            progress.shard(shard, sidecar, *made.units(model, mesh))
            if progress.quarantined > max(10, config.max_quarantined * progress.clips):
                raise TooManyUnreadableError(
                    f"{progress.quarantined} of {progress.clips} clips can't be read, more than "
                    f"{config.max_quarantined:.0%}, the last because it {sidecar['quarantined'][-1]['reason']} "
                    "If that is how they are, allow for more with --max-quarantined."
                )
            table = to_parquet(made.rows, model.config, config.tokens, made_with)
            writes.append(writer.submit(store.commit, shard, len(shards), table, sidecar))
            while len(writes) > WRITES_AHEAD:
                progress.while_writing(writes.popleft())
        for write in writes:
            progress.while_writing(write)
    finally:
        decoders.close()
        writer.shutdown()


class _Shard:
    """What becomes of the clips of one shard."""

    def __init__(self, attempt: int, progress: Progress):
        self.rows: list[Row] = []
        self._attempt, self._progress = attempt, progress
        self._taken = deque[tuple[Clip, int]]()
        self._quarantined: list[dict[str, Any]] = []

    def audio(self, decoded: Iterable[tuple[Clip, Decoded]]) -> Iterator[np.ndarray]:
        """Every channel of every clip that could be read."""
        for clip, (channels, seconds) in decoded:
            self._progress.clip(seconds)
            if isinstance(channels, Unreadable):
                self._quarantined.append({**clip._asdict(), "reason": channels.reason, "attempt": self._attempt})
                continue
            for number, samples in enumerate(channels):
                self._taken.append((clip, number))
                yield samples

    def take(self, codes: EncodedClip) -> None:
        """The codes of the next channel, in the order in which `audio` gave them."""
        self.rows.append(Row(*self._taken.popleft(), codes))

    def units(self, model: SNAC, mesh: Mesh) -> tuple[int, int]:
        """How many pad multiples are those of clips, and how many were computed."""
        multiple = model.config.pad_multiple
        asked = [-(-(row.encoded.samples or 0) // multiple) for row in self.rows]
        return sum(asked), computed_blocks(model, asked, mesh)

    def sidecar(self, read: int) -> dict[str, Any]:
        """The sums, of `read` clips."""
        committed, bad = len({row.clip.id for row in self.rows}), len(self._quarantined)
        if committed + bad != read:
            raise RuntimeError(f"{read} clips were read, but {committed} have codes and {bad} are in quarantine.")
        return {
            "clips": read,
            "committed": committed,
            "rows": len(self.rows),
            "samples": sum(row.encoded.samples or 0 for row in self.rows),
            "tokens": sum(len(level) for row in self.rows for level in row.encoded.codes),
            "attempt": self._attempt,
            "quarantined": self._quarantined,
        }


def _contents(
    shards: list[list[corpus.Source]], attempts: Iterable[int], read: Counter[int]
) -> Iterator[tuple[Clip | None, Content]]:
    """Every clip of these shards, counted in `read`; after each shard's comes None."""
    for shard in attempts:
        ids: set[str] = set()
        for clip, content in itertools.chain.from_iterable(map(clips, shards[shard])):
            read[shard] += 1
            twice = clip.id in ids
            ids.add(clip.id)
            yield clip, Unreadable("another clip of its shard has the same id.") if twice else content
        yield None, Unreadable("the shard ends here.")


def _of_one_shard(decoded: Iterator[tuple[Clip | None, Decoded]]) -> Iterator[tuple[Clip, Decoded]]:
    for clip, result in decoded:
        if clip is None:
            return
        yield clip, result


def _cores() -> int:
    """Those that this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
