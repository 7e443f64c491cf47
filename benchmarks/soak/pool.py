"""Open, feed, end and abort the streams of pools in random order. Each must equal its own decode or encode.

The models are small and random: with snac_24khz there would be few streams per hour.
"""

import functools
import os
import random
import time
from collections import Counter
from typing import Any

from helpers import small, streams

import snax
from benchmarks.soak.processes import memory_mb

SLOTS = (1, 3, 8)
# Streams per round. Every round has the same clips in another order. New ones would at some time have two codes at
# distances that are equal but for float32 rounding, and `encode` may choose the other one.
ROUND = 100


def pool(seconds: float) -> dict[str, Any]:
    rng, counts, memory = random.Random(0), Counter[str](), []
    start, next_sample = time.monotonic(), 0.0
    while (now := time.monotonic() - start) < seconds:
        if now >= next_sample:
            memory.append(memory_mb([os.getpid()]))
            next_sample += 60
        kind, name, slots = rng.choice(["decode", "noise", "encode"]), rng.choice([*small.CONFIGS]), rng.choice(SLOTS)
        pool, model = pool_of(kind, name, slots), small.variant(name)
        if kind == "encode":
            new_caller = streams.encoding(pool, model, rng)
        else:
            new_caller = streams.decoding(pool, model, rng, kind == "noise")
        counts += streams.run_at_random(pool, ROUND, rng, new_caller)
        counts["streams"] += ROUND
    return {
        "hours": round((time.monotonic() - start) / 3600, 2),
        "streams": counts["streams"],
        "streams_aborted": counts["aborted"],
        "streams_that_equal_decode_or_encode": counts["ended"],  # asserted by `run_at_random`
        "steps": counts["steps"],
        "pools": pool_of.cache_info().currsize,
        "MB_each_minute": memory,
    }


@functools.cache  # slots are reused for hours
def pool_of(kind: str, name: str, slots: int) -> Any:
    if kind == "encode":
        return snax.StreamEncoderPool(small.variant(name), slots)
    return snax.StreamPool(small.variant(name), slots, noise=kind == "noise")
