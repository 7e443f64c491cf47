"""Make shards: decode, encode and commit them. One worker uses all local devices of its process."""

import importlib.metadata
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import soundfile
import soxr
from jax.sharding import Mesh

from ..codec.model import SNAC
from ..data import corpus
from ..data.decoding import Decoded, DecoderPool
from ..data.reading import Clip, Content, Unreadable, clips
from ..inference.packing import ROW_CONTEXTS, EncodedClip, computed_blocks, encode_many
from ..tokens import token_layout
from ..weights.checkpoint import fingerprint
from .config import ExtractConfig
from .progress import SECONDS, Made
from .store import COUNTS, Store
from .table import Row, to_parquet

WAITING_FOR_DECODERS, WAITING_FOR_WRITES, DECODING = SECONDS
# Shards that may wait to be written while the next one is encoded.
MAX_PENDING_WRITES = 2


class TooManyUnreadableError(ValueError):
    """Too large a fraction of the clips is unreadable, so the inputs are probably wrong."""


class Worker:
    """Makes shards on all local devices.

    Args:
        model: the codec.
        config: the configuration of the extraction.
        num_decoders: number of decoder processes.

    Raises:
        ValueError: if the token layout or the 16 bits of a code do not fit the model.
    """

    def __init__(self, model: SNAC, config: ExtractConfig, num_decoders: int):
        if model.config.codebook_size > 2**16:
            raise ValueError(
                f"`codebook_size` (={model.config.codebook_size}) must be at most {2**16}: shards store codes in 16 "
                "bits."
            )
        if config.tokens is not None:
            token_layout(config.tokens, model.config)  # raises if it does not fit the model
        self.seen: Counter[str] = Counter()
        """The clips of the job so far, and those in quarantine, as far as this worker knows."""
        self._model, self._config, self._num_decoders = model, config, num_decoders
        self._mesh = Mesh(np.array(jax.local_devices()), ("rows",))
        self._read: Counter[int] = Counter()
        self._seconds = dict.fromkeys(SECONDS, 0.0)

    @property
    def description(self) -> dict[str, Any]:
        """What the bytes of the shards depend on, other than the inputs."""
        model, config = self._model, self._config
        return {
            "format": 2,
            "snax": _version("snax-codec"),
            "model": config.model,
            "fingerprint": fingerprint(model),
            "sampling_rate": model.config.sampling_rate,
            "vq_strides": list(model.config.vq_strides),
            "codebook_size": model.config.codebook_size,
            "platform": jax.devices()[0].platform,
            "device_kind": jax.devices()[0].device_kind,
            "jaxlib": _version("jaxlib"),
            "libsndfile": soundfile.__libsndfile_version__,
            "av": _version("av"),
            "resampler": f"soxr {soxr.__version__} HQ",
            "row_contexts": ROW_CONTEXTS,
            "channels": config.channels,
            "tokens": config.tokens,
            "max_seconds": config.max_seconds,
        }

    def made_with(self, shards: list[list[corpus.Source]]) -> dict[str, Any]:
        """Return everything that the bytes of the shards depend on."""
        return self.description | {"plan": corpus.digest(shards)}

    def make(
        self,
        shards: list[list[corpus.Source]],
        attempts: Iterable[tuple[int, int]],
        on_commit: Callable[[Made], None],
        on_clip: Callable[[], Any] = lambda: None,
        on_error: Callable[[int, Exception], None] = lambda shard, error: None,
    ) -> None:
        """Make shards, one after the other. The decoders work ahead on the next shard if `attempts` has one.

        Args:
            shards: the plan.
            attempts: the shards to make, each with the number of this attempt.
            on_commit: called for each shard when it is committed, from another thread.
            on_clip: called for each clip when it is decoded.
            on_error: called if a shard cannot be written, from another thread. The error is also raised, but not before
                the next shard comes from `attempts`.

        Raises:
            TooManyUnreadableError: if more clips than `config.max_quarantined` are in quarantine.
            OSError: if reading or writing fails for a reason other than a bad clip.
        """
        config, store, made_with = self._config, Store(self._config.out), self.made_with(shards)
        decoders = DecoderPool(
            self._num_decoders,
            self._model.config.sampling_rate,
            separate=config.channels == "separate",
            max_seconds=config.max_seconds,
        )
        writer, writes = ThreadPoolExecutor(1, "writer"), deque[Future[None]]()

        def commit(builder: "_ShardBuilder", sidecar: dict[str, Any], made: Made) -> None:
            try:
                table = to_parquet(builder.rows, self._model.config, config.tokens, made_with)
                store.commit(builder.shard, len(shards), table, sidecar)
            except Exception as error:
                on_error(builder.shard, error)
                raise
            on_commit(made)

        try:
            decoded = self._timed(decoders.map(self._contents(shards, attempts)))
            for first in decoded:
                (shard, attempt, _), _ = first
                builder = _ShardBuilder(shard, attempt)
                # The decoders may already work on the next shard. The packed rows hold clips of this shard only, so
                # that its bytes do not depend on the others.
                own = self._until_shard_end(itertools.chain([first], decoded), on_clip)
                for codes in encode_many(self._model, builder.audio(own), mesh=self._mesh):
                    builder.add_codes(codes)
                sidecar = builder.sidecar(self._read.pop(shard, 0)) | {"made_with": made_with}
                self._check_quarantined(sidecar)
                counts = {key: sidecar[key] for key in COUNTS} | {"quarantined": len(sidecar["quarantined"])}
                seconds, self._seconds = self._seconds, dict.fromkeys(SECONDS, 0.0)
                made = Made(shard, counts, *builder.count_blocks(self._model, self._mesh), seconds)
                writes.append(writer.submit(commit, builder, sidecar, made))
                while len(writes) > MAX_PENDING_WRITES:
                    self._wait_for(writes.popleft())
            for write in writes:
                self._wait_for(write)
        finally:
            decoders.close()
            writer.shutdown()

    def _contents(
        self, shards: list[list[corpus.Source]], attempts: Iterable[tuple[int, int]]
    ) -> Iterator[tuple["_Tag", Content]]:
        """Yield the clips of these shards and count them. A tag without a clip marks the end of each shard."""
        for shard, attempt in attempts:
            ids: set[str] = set()
            for clip, content in itertools.chain.from_iterable(map(clips, shards[shard])):
                self._read[shard] += 1
                duplicate = clip.id in ids
                ids.add(clip.id)
                content = Unreadable("another clip in the shard has the same id.") if duplicate else content
                yield _Tag(shard, attempt, clip), content
            yield _Tag(shard, attempt, None), Unreadable("end of shard")

    def _until_shard_end(
        self, decoded: Iterable[tuple["_Tag", Decoded]], on_clip: Callable[[], Any]
    ) -> Iterator[tuple[Clip, Decoded]]:
        """Yield the clips up to the next end of a shard."""
        for tag, result in decoded:
            if tag.clip is None:
                return
            self._seconds[DECODING] += result.seconds
            on_clip()
            yield tag.clip, result

    def _check_quarantined(self, sidecar: dict[str, Any]) -> None:
        """Stop before a shard is committed that has too many clips in quarantine, together with those before it."""
        self.seen.update(clips=sidecar["clips"], quarantined=len(sidecar["quarantined"]))
        clip_count, quarantined = self.seen["clips"], self.seen["quarantined"]
        if quarantined > max(10, self._config.max_quarantined * clip_count):
            last = sidecar["quarantined"][-1]
            raise TooManyUnreadableError(
                f"{quarantined} of {clip_count} clips cannot be read, more than `max_quarantined` "
                f"(={self._config.max_quarantined:.0%}). The last one is {last['id']}: {last['reason']} "
                "Check the inputs, or raise `max_quarantined`."
            )

    def _timed(self, decoded: Iterable[Any]) -> Iterator[Any]:
        """Yield decoded clips and record the time that each takes to arrive."""
        iterator = iter(decoded)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._seconds[WAITING_FOR_DECODERS] += time.perf_counter() - start
            yield item

    def _wait_for(self, write: Future[None]) -> None:
        start = time.perf_counter()
        write.result()
        self._seconds[WAITING_FOR_WRITES] += time.perf_counter() - start


class _Tag(NamedTuple):
    shard: int
    attempt: int
    clip: Clip | None


class _ShardBuilder:
    """The rows and the quarantined clips of one shard while it is encoded."""

    def __init__(self, shard: int, attempt: int):
        self.shard = shard
        self.rows: list[Row] = []
        self._attempt = attempt
        self._pending = deque[tuple[Clip, int]]()  # channels that await their codes
        self._quarantined: list[dict[str, Any]] = []

    def audio(self, decoded: Iterable[tuple[Clip, Decoded]]) -> Iterator[np.ndarray]:
        """Yield each channel of each readable clip. Unreadable clips go into quarantine."""
        for clip, (channels, _) in decoded:
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


def _version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
