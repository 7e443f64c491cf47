"""Time training steps. The processes of a case compile at once and then take turns."""

import contextlib
import dataclasses
import itertools
import json
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
    rows = []
    for case in CASES:
        row: dict[str, Any] = {"case": case}
        with contextlib.ExitStack() as stack:
            keys = list(itertools.product(("float32", "bfloat16"), ("snax", "torch")))
            workers = {key: stack.enter_context(worker(serve_steps, case, *key)) for key in keys}
            failed = [key for key, pipe in workers.items() if not is_ready(pipe)]
            for (dtype, system), pipe in workers.items():
                row[f"{system}, {dtype}"] = "failed" if (dtype, system) in failed else ask(pipe, "time")
        rows.append(row)
        print(json.dumps(row), flush=True)
        save("training", {"rows": rows})


def is_ready(pipe: Connection) -> bool:
    """Wait until a process has compiled its step. Returns whether it could."""
    try:
        return bool(pipe.recv())
    except EOFError:
        return False


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
