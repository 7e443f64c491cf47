"""Plot the metrics of training runs, each of which began with the weights of the one before:
`python recipes/curves.py RUN/log.jsonl... OUT.png`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Records = list[dict[str, Any]]


def main() -> None:
    *logs, out = sys.argv[1:]
    starts, records = [0], Records()
    for log in logs:
        run = [json.loads(line) for line in Path(log).read_text().splitlines()]
        records += [record | {"step": starts[-1] + record["step"]} for record in run]
        starts.append(records[-1]["step"])
    train, held_out = ([record for record in records if record["kind"] == kind] for kind in ("train", "held_out"))
    figure = Figure(figsize=(14, 4), layout="constrained")
    axes: Any = figure.subplots(1, 4)
    for ax, name in zip(axes, ("mel", "stft"), strict=False):
        plot(ax, train, name, "training")
        plot(ax, held_out, name, "held out, averaged weights", marker="o")
        ax.set(title=f"{name} distance", yscale="log")
    plot(axes[2], held_out, "stoi", "held out, averaged weights", marker="o")
    axes[2].set(title="STOI")
    for name in sorted(name for name in train[0] if name.endswith("/perplexity")):
        plot(axes[3], train, name, name.partition("/")[0])
    axes[3].set(title="perplexity of the codebooks")
    for ax in axes:
        for start in starts[1:-1]:
            ax.axvline(start, color="gray", linestyle=":")
        ax.set_xlabel("step")
        ax.legend()
    figure.savefig(out, dpi=80)


def plot(ax: Any, records: Records, name: str, label: str, **style: Any) -> None:
    """Plot a metric over the steps that have it."""
    points = [(record["step"], record[name]) for record in records if name in record]
    if points:
        ax.plot(*zip(*points, strict=True), label=label, **style)


if __name__ == "__main__":
    main()
