"""Make this process's share of the shards: all of them, or those of one process of a distributed job."""

import os
from collections.abc import Callable
from typing import Any

import jax

from .. import distributed
from ..codec.model import SNAC
from ..data import corpus
from .config import ExtractConfig
from .progress import Progress
from .store import SUCCESS, Store
from .worker import Worker


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
    worker, store = Worker(model, config, config.num_decoders or min(16, _cores())), Store(config.out)
    if jax.process_index() == 0:
        shards = corpus.plan(config.inputs, config.clips_per_shard)
        store.begin(shards, worker.made_with(shards))
        distributed.barrier("planned")
    else:
        distributed.barrier("planned")
        shards = store.join(worker.made_with)
    own = range(jax.process_index(), len(shards), jax.process_count())
    attempts = store.attempts(own, len(shards), retry=config.retry_quarantined)
    clips = corpus.count_clips([shards[shard] for shard in attempts])
    progress = Progress(len(attempts), clips, model.config.sampling_rate, report, jax.process_index())
    if attempts:
        store.remove(SUCCESS)
        worker.make(shards, attempts.items(), progress.add_shard, progress.add_clips)
    distributed.barrier("committed")
    totals = store.finish(shards, model.config.sampling_rate) if jax.process_index() == 0 else {}
    distributed.barrier("finished")
    return progress.finish(totals)


def _cores() -> int:
    """Return the number of cores that this process may use, or of all cores where that is not known."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
