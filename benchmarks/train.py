"""A training step beside torch's on the same cores: `python -m benchmarks.train`.

Both take the same step (tests/helpers/torch_training.py; tests/test_training.py compares the losses) from the same
weights on the same audio, each in a process of its own, in turns. On Linux both get memory in huge pages, without which
XLA's step takes up to twice as long. Writes benchmarks/train.json.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

import snax
from benchmarks.speed import machine
from snax.train.config import TrainConfig, read
from snax.train.step import init_state, train_step
from tests.helpers.recordings import clip
from tests.helpers.torch_training import Trainer

HERE = Path(__file__).parent
THREADS = len(os.sched_getaffinity(0))
ROUNDS, STEPS = 3, 4

# The recipe, examples per step, and whether discriminators are used.
CASES = {
    "mini_16khz, 6 x 0.64 s": ("mini_16khz", 6, False),
    "snac_24khz, 2 x 0.85 s": ("snac_24khz", 2, False),
    "snac_24khz with discriminators, 2 x 0.85 s": ("snac_24khz", 2, True),
}


def main() -> None:
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # for the processes that begin below
    rows = []
    for case in CASES:
        pipes = {system: begun(system, case) for system in ("snax", "torch")}
        speeds: dict[str, list[float]] = {system: [] for system in pipes}
        for _ in range(ROUNDS):
            for system, pipe in pipes.items():
                pipe.send(STEPS)
                speeds[system].append(CASES[case][1] / pipe.recv())
        for pipe in pipes.values():
            pipe.send(0)
        medians = {system: statistics.median(values) for system, values in speeds.items()}
        rows.append({"case": case, "examples_per_second": medians, "ratio": medians["snax"] / medians["torch"]})
        print(json.dumps(rows[-1]), flush=True)
    (HERE / "train.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def begun(system: str, case: str) -> Connection:
    """A process that takes steps: send it how many, and it says the seconds of the median one."""
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(system, case, theirs), daemon=True).start()
    ours.recv()  # it is ready
    return ours


def serve(system: str, case: str, pipe: Connection) -> None:
    torch.set_num_threads(THREADS)
    name, batch, adversarial = CASES[case]
    config = read(HERE.parent / "recipes" / f"{name}.toml")
    config = dataclasses.replace(config, dtype="float32", dead_code_threshold=0.0)
    assert config.model is not None
    model_config = config.model
    samples = config.data.crop_samples(model_config)
    speech = clip("speech_7s.wav", model_config.sampling_rate, 7)[0, 0]
    starts = np.linspace(0, len(speech) - samples, batch).astype(int)
    audio = np.stack([speech[start : start + samples] for start in starts])[:, None].astype(np.float32)
    model = snax.SNAC(model_config, rngs=nnx.Rngs(0))
    take = {"snax": in_jax, "torch": in_torch}[system](model, audio, config, adversarial)
    take()
    pipe.send("ready")
    while count := pipe.recv():
        times = []
        for _ in range(count):
            start = time.perf_counter()
            take()
            times.append(time.perf_counter() - start)
        pipe.send(statistics.median(times))


def in_jax(model: snax.SNAC, audio: np.ndarray, config: TrainConfig, adversarial: bool) -> Callable[[], Any]:
    state = jax.jit(functools.partial(init_state, config=config))(model)
    compiled = jax.jit(functools.partial(train_step, config=config, adversarial=adversarial), donate_argnums=0)

    def take() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, audio))

    return take


def in_torch(model: snax.SNAC, audio: np.ndarray, config: TrainConfig, adversarial: bool) -> Callable[[], Any]:
    discriminator_state = init_state(model, config).discriminator_state if adversarial else None
    trainer = Trainer(model, discriminator_state.networks if discriminator_state else None, config)
    return lambda: trainer.step(torch.tensor(audio))


if __name__ == "__main__":
    main()
