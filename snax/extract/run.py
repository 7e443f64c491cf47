"""The extraction loop: decode, encode and commit this process's shards, one after the other."""

import importlib.metadata
import itertools
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import soundfile
import soxr
from jax.sharding import Mesh

from .. import distributed
from ..codec.model import SNAC
from ..data import corpus
from ..data.decoding import Decoded, DecoderPool
from ..data.reading import Clip, Content, Unreadable, clips
from ..inference.packing import ROW_CONTEXTS, EncodedClip, computed_blocks, encode_many
from ..weights.checkpoint import fingerprint
from .config import ExtractConfig
from .progress import Progress
from .store import SUCCESS, Store
from .table import Row, to_parquet, token_layout

_log = logging.getLogger(__name__)

# Shards that may wait to be written while the next one is encoded.
MAX_PENDING_WRITES = 2


class TooManyUnreadableError(ValueError):
    """Too large a fraction of the clips is unreadable, so the inputs are probably wrong."""


def extract(
    model: SNAC, config: ExtractConfig, report: Callable[[dict[str, Any]], None] = lambda event: None
) -> dict[str, Any]:
    """Encode a corpus into token shards. Shards that are already committed are skipped.

    Encoding uses all local devices. In a distributed job, each process makes its own share of the shards. The bytes of
    the shards depend only on the inputs, the configuration and the model. They do not depend on the number of processes
    and devices, or on interruptions.

    Args:
        model: the codec.
        config: the inputs, the output directory and the options.
        report: called with a JSON-serializable event for each encoded shard, and with the result at the end.

    Returns:
        The totals of this process's share. `"total"` holds the totals of the whole extraction, in process 0 only.

    Raises:
        ValueError: if the inputs or the output directory cannot be used, the token layout or the 16 bits of a code do
            not fit the model, or too many clips are unreadable (`TooManyUnreadableError`).
        OSError: if reading or writing fails for a reason other than a bad clip.
    """
    if model.config.codebook_size > 2**16:
        raise ValueError(
            f"`codebook_size` (={model.config.codebook_size}) must be at most {2**16}: shards store codes in 16 bits."
        )
    if config.tokens is not None:
        token_layout(config.tokens, model.config)  # raises if it does not fit the model
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
    clip_count = None if any(source.kind == "tar" for source in sources) else sum(map(corpus.planned_clips, sources))
    progress = Progress(len(attempts), clip_count, model.config.sampling_rate, report)
    if attempts:
        store.remove(SUCCESS)
        _make_shards(model, config, store, shards, attempts, progress)
    distributed.barrier("committed")
    totals = store.finish(shards, model.config.sampling_rate) if jax.process_index() == 0 else {}
    distributed.barrier("finished")
    return progress.finish(totals)


def _made_with(model: SNAC, config: ExtractConfig, shards: list[list[corpus.Source]]) -> dict[str, Any]:
    """Return everything that the bytes of the shards depend on."""
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
        "channels": config.channels,
        "tokens": config.tokens,
        "max_seconds": config.max_seconds,
        "plan": corpus.digest(shards),
    }


def _attempts(store: Store, shards: list[list[corpus.Source]], *, retry: bool) -> dict[int, int]:
    """Return the shards that this process still has to make, each with the number of this attempt."""
    attempts = {}
    own_shards = range(jax.process_index(), len(shards), jax.process_count())
    for shard, sidecar in zip(own_shards, store.sidecars(own_shards), strict=True):
        if sidecar is None:
            attempts[shard] = 1
        elif not store.is_whole(shard, len(shards), sidecar):
            _log.warning("shard %d does not match the hash in its sidecar; it will be made again", shard)
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
    """Decode, encode and commit the shards in `attempts`."""
    mesh = Mesh(np.array(jax.local_devices()), ("rows",))
    made_with = _made_with(model, config, shards)
    decoders = DecoderPool(
        config.num_workers or min(16, _cores()),
        model.config.sampling_rate,
        separate=config.channels == "separate",
        max_seconds=config.max_seconds,
    )
    writer, writes = ThreadPoolExecutor(1, "writer"), deque[Future[None]]()
    read: Counter[int] = Counter()
    try:
        decoded = progress.time_decoders(decoders.map(_contents(shards, attempts, read)))
        for shard, attempt in attempts.items():
            builder = _ShardBuilder(attempt, progress)
            # The decoders may already work on the next shard. The packed rows hold clips of this shard only, so that
            # its bytes do not depend on the others.
            for codes in encode_many(model, builder.audio(_until_shard_end(decoded)), mesh=mesh):
                builder.add_codes(codes)
            sidecar = builder.sidecar(read[shard]) | {"made_with": made_with}
            progress.add_shard(shard, sidecar, *builder.count_blocks(model, mesh))
            if progress.quarantined > max(10, config.max_quarantined * progress.clips):
                last = sidecar["quarantined"][-1]
                raise TooManyUnreadableError(
                    f"{progress.quarantined} of {progress.clips} clips cannot be read, more than `max_quarantined` "
                    f"(={config.max_quarantined:.0%}). The last one is {last['id']}: {last['reason']} "
                    "Check the inputs, or raise `max_quarantined`."
                )
            table = to_parquet(builder.rows, model.config, config.tokens, made_with)
            writes.append(writer.submit(store.commit, shard, len(shards), table, sidecar))
            while len(writes) > MAX_PENDING_WRITES:
                progress.wait_for_write(writes.popleft())
        for write in writes:
            progress.wait_for_write(write)
    finally:
        decoders.close()
        writer.shutdown()


class _ShardBuilder:
    """The rows and the quarantined clips of one shard while it is encoded."""

    def __init__(self, attempt: int, progress: Progress):
        self.rows: list[Row] = []
        self._attempt, self._progress = attempt, progress
        self._pending = deque[tuple[Clip, int]]()  # channels that await their codes
        self._quarantined: list[dict[str, Any]] = []

    def audio(self, decoded: Iterable[tuple[Clip, Decoded]]) -> Iterator[np.ndarray]:
        """Yield each channel of each readable clip. Unreadable clips go into quarantine."""
        for clip, (channels, seconds) in decoded:
            self._progress.add_clip(seconds)
            if isinstance(channels, Unreadable):
                self._quarantined.append({**clip._asdict(), "reason": channels.reason, "attempt": self._attempt})
                continue
            for channel, samples in enumerate(channels):
                self._pending.append((clip, channel))
                yield samples

    def add_codes(self, codes: EncodedClip) -> None:
        """Add the codes of the next channel. Channels arrive in the order in which `audio` yielded them."""
        self.rows.append(Row(*self._pending.popleft(), codes))

    def count_blocks(self, model: SNAC, mesh: Mesh) -> tuple[int, int]:
        """Return the number of blocks (pad multiples) in the clips, and the number computed for them in packed rows."""
        multiple = model.config.pad_multiple
        clip_blocks = [-(-(row.encoded.samples or 0) // multiple) for row in self.rows]
        return sum(clip_blocks), computed_blocks(model, clip_blocks, mesh)

    def sidecar(self, read: int) -> dict[str, Any]:
        """Return the shard's counts and quarantined clips. Fails unless all `read` clips are accounted for."""
        committed, bad = len({row.clip.id for row in self.rows}), len(self._quarantined)
        if committed + bad != read:
            raise RuntimeError(f"{read} clips were read, but {committed} were encoded and {bad} are in quarantine.")
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
    """Yield the clips of these shards and count them in `read`. A None marks the end of each shard."""
    for shard in attempts:
        ids: set[str] = set()
        for clip, content in itertools.chain.from_iterable(map(clips, shards[shard])):
            read[shard] += 1
            duplicate = clip.id in ids
            ids.add(clip.id)
            yield clip, Unreadable("another clip in the shard has the same id.") if duplicate else content
        yield None, Unreadable("end of shard")


def _until_shard_end(decoded: Iterator[tuple[Clip | None, Decoded]]) -> Iterator[tuple[Clip, Decoded]]:
    """Yield the clips up to the next end of a shard."""
    for clip, result in decoded:
        if clip is None:
            return
        yield clip, result


def _cores() -> int:
    """Return the number of cores that this process may use, or of all cores where that is not known."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
