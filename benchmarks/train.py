"""Compare the speed of a training step in snax and in torch on CPUs: `python -m benchmarks.train`.

Both run the same step from the same weights on the same audio (tests/helpers/torch_training.py is the step in torch;
tests/test_training.py compares the losses). Each runs in a process of its own, and they take turns. On Linux both use
huge pages; without them XLA's step takes up to twice as long. Writes benchmarks/train.json.
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
from snax.train.step import compiler_options, init_state, train_step
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
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # for the child processes
    rows = []
    for case in CASES:
        pipes = {system: start_worker(system, case) for system in ("snax", "torch")}
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


def start_worker(system: str, case: str) -> Connection:
    """Start a process that receives a number of steps and sends back the median seconds of a step. 0 ends it."""
    connection, child_connection = multiprocessing.Pipe()
    args = (system, case, child_connection)
    multiprocessing.get_context("spawn").Process(target=serve, args=args, daemon=True).start()
    connection.recv()  # ready
    return connection


def serve(system: str, case: str, pipe: Connection) -> None:
    torch.set_num_threads(THREADS)
    name, batch, adversarial = CASES[case]
    config = recipe(name)
    step = STEP[system](*model_and_audio(config, batch), config, adversarial)
    step()
    pipe.send("ready")
    while count := pipe.recv():
        times = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        pipe.send(statistics.median(times))


def recipe(name: str) -> TrainConfig:
    """Return a recipe without the replacement of dead codes, which the step in torch does not have."""
    config = read(HERE.parent / "recipes" / f"{name}.toml")
    return dataclasses.replace(config, dtype="float32", dead_code_threshold=0.0)


def model_and_audio(config: TrainConfig, batch: int) -> tuple[snax.SNAC, np.ndarray]:
    assert config.model is not None
    samples = config.data.crop_samples(config.model)
    speech = clip("speech_7s.wav", config.model.sampling_rate, 7)[0, 0]
    starts = np.linspace(0, len(speech) - samples, batch).astype(int)
    audio = np.stack([speech[start : start + samples] for start in starts])[:, None].astype(np.float32)
    return snax.SNAC(config.model, rngs=nnx.Rngs(0)), audio


def jax_step(model: snax.SNAC, audio: np.ndarray, config: TrainConfig, adversarial: bool) -> Callable[[], Any]:
    state = jax.jit(functools.partial(init_state, config=config))(model)
    compiled = jax.jit(
        functools.partial(train_step, config=config, adversarial=adversarial),
        donate_argnums=0,
        compiler_options=compiler_options(adversarial),
    )

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, audio))

    return step


def torch_step(model: snax.SNAC, audio: np.ndarray, config: TrainConfig, adversarial: bool) -> Callable[[], Any]:
    discriminator_state = init_state(model, config).discriminator_state if adversarial else None
    trainer = Trainer(model, discriminator_state.networks if discriminator_state else None, config)
    return lambda: trainer.step(torch.tensor(audio))


STEP = {"snax": jax_step, "torch": torch_step}


if __name__ == "__main__":
    main()
