"""Draw the log of a training run: `python recipes/curves.py RUN/log.jsonl OUT.png`."""

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def main() -> None:
    lines = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    trained, held_out = ([line for line in lines if line["kind"] == kind] for kind in ("train", "held_out"))
    figure = Figure(figsize=(14, 4), layout="constrained")
    axes: Any = figure.subplots(1, 4)
    for ax, name in zip(axes, ("mel", "stft"), strict=False):
        draw(ax, trained, name, "training")
        draw(ax, held_out, name, "held out, averaged weights", marker="o")
        ax.set(title=f"{name} distance", yscale="log")
    draw(axes[2], held_out, "stoi", "held out, averaged weights", marker="o")
    axes[2].set(title="STOI")
    for name in sorted(name for name in trained[0] if name.endswith("/perplexity")):
        draw(axes[3], trained, name, name.partition("/")[0])
    axes[3].set(title="perplexity of the codebooks")
    for ax in axes:
        ax.set_xlabel("step")
        ax.legend()
    figure.savefig(sys.argv[2], dpi=80)


def draw(ax: Any, lines: list[dict[str, Any]], name: str, label: str, **how: Any) -> None:
    there = [line for line in lines if name in line]
    ax.plot([line["step"] for line in there], [line[name] for line in there], label=label, **how)


if __name__ == "__main__":
    main()
