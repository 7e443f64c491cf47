"""Output of training metrics: a progress bar or lines of text, lines of JSON, and TensorBoard."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ..atomic import atomic_write
from ..evaluate.pictures import spectrograms

_log = logging.getLogger(__name__)

# Seconds from one line to the next where there is no terminal.
_BETWEEN_LINES = 30.0


class MetricWriter:
    """Writes the metrics of a training run to the folder `out`.

    Continues after step `done`: records of later steps, from before an interruption, are removed.
    """

    def __init__(self, out: Path, done: int, steps: int, rate: int):
        self._path, self._rate, self._steps = out / "log.jsonl", rate, steps
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines(True) if _step(line) <= done]
            with atomic_write(self._path) as temporary:
                temporary.write_text("".join(kept))
        self._board = SummaryWriter(os.fspath(out / "tensorboard"), purge_step=done + 1)
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None)
        self._last_line = time.perf_counter()

    def write_train(self, step: int, means: dict[str, float], steps_per_second: float) -> None:
        """Write the means of the metrics of the last steps."""
        self._record(step, "train", means | {"steps_per_second": steps_per_second})
        self._bar.update(step - self._bar.n)
        line = f"loss {means['loss']:.3f}, {steps_per_second:.2f} steps/s"
        self._bar.set_postfix_str(line)
        if self._bar.disable and (time.perf_counter() - self._last_line > _BETWEEN_LINES or step == self._steps):
            self._last_line = time.perf_counter()
            _log.info("step %d of %d, %s", step, self._steps, line)

    def write_eval(
        self, step: int, means: dict[str, float], pairs: list[tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]]
    ) -> None:
        """Write the scores on held-out clips, and some of these clips with their reconstructions."""
        self._record(step, "held_out", means)
        _log.info("step %d, held-out clips: %s", step, _words(means))
        for i, (clip, decoded) in enumerate(pairs):
            figure = Figure(figsize=(10, 6), layout="constrained")
            spectrograms(figure, {"original": clip, f"step {step}": decoded}, self._rate)
            self._board.add_figure(f"clip_{i}", figure, step)
            self._board.add_audio(f"clip_{i}/decoded", decoded, step, self._rate)
            if step <= self._steps:
                self._board.add_audio(f"clip_{i}/original", clip, step, self._rate)
        self._board.flush()

    def close(self) -> None:
        self._board.close()
        self._bar.close()

    def _record(self, step: int, kind: str, values: dict[str, float]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)


def _step(line: str) -> float:
    """The step of a line; infinity for an incomplete line, which a killed process leaves."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
