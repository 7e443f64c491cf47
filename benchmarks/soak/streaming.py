"""Decode one endless stream of snac_24khz with random weights, one coarse frame per step.

The codes repeat. The samples of every round must equal those of the round before, and memory must not grow.
"""

import os
import time
from typing import Any

import numpy as np
from flax import nnx

import snax
from benchmarks.soak.processes import memory_mb
from snax.codec.config import PUBLISHED_CONFIGS


def streaming(seconds: float) -> dict[str, Any]:
    config = PUBLISHED_CONFIGS["snac_24khz"]
    model = snax.SNAC(config, rngs=nnx.Rngs(0))
    rng, groups = np.random.default_rng(0), 50  # 4.3 s
    per_group = [max(config.vq_strides) // stride for stride in config.vq_strides]
    codes = [rng.integers(config.codebook_size, size=(groups, 1, count), dtype=np.int32) for count in per_group]
    decoder = snax.StreamDecoder(model)
    state, rounds, memory = decoder.init_state(), 0, []
    previous: np.ndarray | None = None
    start, next_sample = time.monotonic(), 0.0
    while (now := time.monotonic() - start) < seconds:
        steps = []
        for group in range(groups):
            state, audio = decoder.step(state, tuple(level[group] for level in codes))
            steps.append(np.asarray(audio))
        samples = np.concatenate(steps, axis=-1)
        if rounds >= 2:  # the first round starts without a past and is shorter by the latency
            assert previous is not None
            np.testing.assert_array_equal(samples, previous)
        previous, rounds = samples, rounds + 1
        if now >= next_sample:
            memory.append(memory_mb([os.getpid()]))
            next_sample += 60
    audio_seconds = rounds * groups * config.hop_length * max(config.vq_strides) / config.sampling_rate
    return {
        "hours": seconds / 3600,
        "hours_of_audio": round(audio_seconds / 3600, 2),
        "rounds_that_sound_alike": rounds - 2,
        "MB_each_minute": memory,
    }
