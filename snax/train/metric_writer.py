"""Output of training metrics: a progress bar or log messages, a JSON lines file, and TensorBoard."""

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

# The minimal number of seconds between log messages of training metrics if the progress bar is disabled.
_LOG_INTERVAL_S = 30.0


class MetricWriter:
    """Writer of the metrics of a training run: `log.jsonl`, `tensorboard/`, and a progress bar on a terminal.

    Records of steps after `done` are removed: a run that was interrupted computes these steps again.

    Args:
        out: the folder of the run.
        done: the number of steps taken so far.
        steps: the total number of training steps.
        rate: the sampling rate of the codec, in Hz.
    """

    def __init__(self, out: Path, done: int, steps: int, rate: int):
        self._path, self._rate, self._steps = out / "log.jsonl", rate, steps
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines(True) if _step(line) <= done]
            with atomic_write(self._path) as temporary:
                temporary.write_text("".join(kept))
        self._board = SummaryWriter(os.fspath(out / "tensorboard"), purge_step=done + 1)
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None)
        self._last_log_time = time.perf_counter()

    def write_train(self, step: int, metrics: dict[str, float], steps_per_second: float) -> None:
        """Write training metrics, each the mean over the steps since the last call."""
        self._record(step, "train", metrics | {"steps_per_second": steps_per_second})
        self._bar.update(step - self._bar.n)
        summary = f"loss {metrics['loss']:.3f}, {steps_per_second:.2f} steps/s"
        self._bar.set_postfix_str(summary)
        if self._bar.disable and (time.perf_counter() - self._last_log_time > _LOG_INTERVAL_S or step == self._steps):
            self._last_log_time = time.perf_counter()
            _log.info("step %d of %d, %s", step, self._steps, summary)

    def write_eval(
        self, step: int, scores: dict[str, float], pairs: list[tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]]
    ) -> None:
        """Write mean scores on held-out clips, and a few of these clips as pairs (original, reconstruction)."""
        self._record(step, "held_out", scores)
        _log.info("step %d, held-out clips: %s", step, _format(scores))
        for i, (clip, decoded) in enumerate(pairs):
            figure = Figure(figsize=(10, 6), layout="constrained")
            spectrograms(figure, {"original": clip, f"step {step}": decoded}, self._rate)
            self._board.add_figure(f"clip_{i}", figure, step)
            self._board.add_audio(f"clip_{i}/decoded", decoded, step, self._rate)
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
    """Return the step of a line of the log, or infinity for an incomplete line, as a killed process leaves it."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


def _format(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())
