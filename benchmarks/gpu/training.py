"""Time training steps. All processes compile at once and then take turns."""

import contextlib
import dataclasses
import itertools
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import train
from benchmarks.speed import ask, worker

from .common import median_seconds, save

# The recipe, examples per step, and whether discriminators are used.
CASES = {
    "mini_16khz, 64 x 0.64 s": ("mini_16khz", 64, False),
    "snac_24khz, 8 x 0.85 s": ("snac_24khz", 8, False),
    "snac_24khz with discriminators, 8 x 0.85 s": ("snac_24khz", 8, True),
}


def training(folder: Path) -> None:
    keys = list(itertools.product(CASES, ("float32", "bfloat16"), ("snax", "torch")))
    rows: dict[str, dict[str, Any]] = {case: {"case": case} for case in CASES}
    with contextlib.ExitStack() as stack:
        workers = {key: stack.enter_context(worker(serve_steps, *key)) for key in keys}
        for pipe in workers.values():
            pipe.recv()  # has compiled
        for (case, dtype, system), pipe in workers.items():
            rows[case][f"{system}, {dtype}"] = ask(pipe, "time")
            print(case, dtype, system, rows[case][f"{system}, {dtype}"], flush=True)
            save("training", {"rows": list(rows.values())})


def serve_steps(pipe: Connection, case: str, dtype: str, system: str) -> None:
    """Compile a step. Then send its examples per second and the seconds of the first step, for each request."""
    name, batch, adversarial = CASES[case]
    config = dataclasses.replace(train.recipe(name), dtype=dtype)
    model, audio = train.model_and_audio(config, batch)
    torch.set_default_device("cuda")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    start = time.perf_counter()
    run = train.STEP[system](model, audio, config, adversarial)

    def step() -> None:
        run()
        torch.cuda.synchronize()

    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"), contextlib.suppress(EOFError):
        step()
        first = time.perf_counter() - start
        pipe.send("ready")
        while True:
            pipe.recv()
            pipe.send({"examples per second": batch / median_seconds(step), "first step": first})
