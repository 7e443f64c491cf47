"""Streams of pools that are opened, fed, ended and aborted in random order."""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import snax
from helpers import small
from snax.inference import pool as pools
from snax.inference import steps

# For float32 rounding, as in test_packing.
AUDIO_BOUND = 1e-5


def codes_of(model: snax.SNAC, blocks: int, seed: int) -> list[np.ndarray]:
    """Return random codes, one (frames / stride,) array per level."""
    rng = np.random.default_rng(seed)
    widths = steps.decoder_widths(model.config)
    return [rng.integers(model.config.codebook_size, size=blocks * width, dtype=np.int32) for width in widths]


def cut(arrays: list[np.ndarray], start: int, stop: int, total: int) -> list[np.ndarray]:
    """Return blocks `start` to `stop` of `total`."""
    return [x[start * len(x) // total : stop * len(x) // total] for x in arrays]


@dataclasses.dataclass
class Caller:
    """One stream, with what it feeds and what it has got."""

    stream: pools.PoolStream[Any]
    values: list[np.ndarray]
    total: int  # pieces, of which any number is fed at a time
    expected: Callable[[], list[np.ndarray]]
    fed: int = 0
    ended: bool = False
    outputs: list[list[np.ndarray]] = dataclasses.field(default_factory=list)


def run_at_random(pool: Any, count: int, rng: random.Random, new_caller: Callable[[int], Caller]) -> Counter[str]:
    """Open, feed, end and abort `count` streams in random order. Compare the output of those that end.

    Returns the numbers of "ended" and "aborted" streams, and of "steps".
    """
    callers: dict[Any, Caller] = {}
    counts, opened = Counter[str](), 0
    while opened < count or callers:
        while pool.free and opened < count and rng.random() < 0.7:
            caller = new_caller(opened)
            callers[caller.stream] = caller
            opened += 1
        for stream, caller in list(callers.items()):
            if caller.ended or rng.random() < 0.3:
                continue
            if rng.random() < 0.02:
                stream.abort()
                del callers[stream]
                counts["aborted"] += 1
            elif caller.fed < caller.total:
                stop = min(caller.total, caller.fed + rng.randint(1, 3))
                values = cut(caller.values, caller.fed, stop, caller.total)
                stream.feed(values if len(values) > 1 or values[0].dtype == np.int32 else values[0])
                caller.fed = stop
            else:
                stream.end()
                caller.ended = True
        counts["steps"] += 1
        for stream, output, last in pool.step().chunks:
            caller = callers[stream]
            caller.outputs.append([output] if isinstance(output, np.ndarray) else list(output))
            if last:
                joined = [np.concatenate(parts) for parts in zip(*caller.outputs, strict=True)]
                for actual, expected in zip(joined, caller.expected(), strict=True):
                    np.testing.assert_allclose(actual, expected, rtol=0, atol=AUDIO_BOUND)
                del callers[stream]
                counts["ended"] += 1
    assert pool.free == len(pool._streams)
    return counts


def decoding(pool: snax.StreamPool, model: snax.SNAC, rng: random.Random, noise: bool) -> Callable[[int], Caller]:
    """Return a function that opens the stream of a number, with random codes."""

    def new_caller(number: int) -> Caller:
        blocks, key = rng.choice([0, 1, 2, 7]), jax.random.key(number) if noise else None
        codes = codes_of(model, blocks, number)

        def expected() -> list[np.ndarray]:
            if not blocks:
                return [np.zeros(0, np.float32)]
            return [np.asarray(model.decode([level[None] for level in codes], key=key))[0, 0]]

        return Caller(pool.open(key=key), codes, blocks, expected)

    return new_caller


def encoding(pool: snax.StreamEncoderPool, model: snax.SNAC, rng: random.Random) -> Callable[[int], Caller]:
    """Return a function that opens the stream of a number, with random audio."""

    def new_caller(number: int) -> Caller:
        samples = rng.choice([1, model.config.pad_multiple, 7 * model.config.pad_multiple + 3])
        audio = small.audio(samples=samples, seed=number)
        return Caller(
            pool.open(),
            [audio[0, 0]],
            min(samples, 11),
            lambda: [np.asarray(level)[0] for level in model.encode(audio)],
        )

    return new_caller
