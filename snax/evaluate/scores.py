"""What scores are said in: a table for people, a line of JSON a clip for programs, a picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..atomic import atomic_write
from ..codec.model import SNAC
from . import metrics
from .pictures import spectrograms
from .scoring import CodebookUse, Scored

# Each metric with its unit and where better is.
METRICS = {
    "mel": "mel distance, less is better",
    "stft": "STFT distance, less is better",
    "si_sdr": "SI-SDR in dB, more is better",
    "stoi": "STOI, 0 to 1, more is better",
    "pesq": "PESQ, 1 to 4.6, more is better",
}


def summary(model: SNAC, clips: Sequence[dict[str, float]], seconds: float, use: CodebookUse) -> dict[str, Any]:
    """The means and what the codes carry, as JSON has it."""
    means = {}
    for name in METRICS:
        values = [scores[name] for scores in clips if not math.isnan(scores[name])]
        quartiles = np.percentile(values, [25, 75]).tolist() if values else [None, None]
        means[name] = {
            "mean": metrics.mean(values) if values else None,
            "quartiles": quartiles,
            "clips": len(values),
        }
    return {
        "clips": len(clips),
        "seconds": seconds,
        "metrics": means,
        "levels": [
            {"codes_per_second": rate, "used": used, "entropy": entropy}
            for rate, used, entropy in zip(model.config.code_rates, use.used, use.entropies, strict=True)
        ],
        "bitrate": model.config.bitrate,
        "information_rate": use.information_rate,
    }


def table(found: dict[str, Any]) -> str:
    """The summary in words."""
    lines = [f"{found['clips']} clips, {found['seconds']:.1f} s"]
    lines.append(f"{'':34}{'mean':>8}   {'half of them in':>18}  clips")
    for name, what in METRICS.items():
        values = found["metrics"][name]
        low, high = values["quartiles"]
        measured = f"{values['mean']:8.3f}   {low:7.3f} to {high:7.3f}" if values["clips"] else f"{'-':>8}{'':22}"
        lines.append(f"{what:34}{measured}  {values['clips']:5}")
    for i, level in enumerate(found["levels"]):
        lines.append(
            f"level {i}: {level['codes_per_second']:.1f} codes a second, {level['used']:.1%} of the codebook used, "
            f"{level['entropy']:.2f} bits each"
        )
    lines.append(
        f"bit rate {found['bitrate'] / 1000:.2f} kbps, of which the codes' entropy is "
        f"{found['information_rate'] / 1000:.2f} kbps"
    )
    return "\n".join(lines)


def write(folder: Path, found: dict[str, Any], clips: Sequence[tuple[str, dict[str, float]]], picture: Figure) -> None:
    """`scores.json` (the summary), `clips.jsonl` (a line a clip) and `scores.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": name} | {key: None if math.isnan(value) else value for key, value in scores.items()})
        for name, scores in clips
    ]
    with atomic_write(folder / "clips.jsonl") as path:
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with atomic_write(folder / "scores.png") as path:
        picture.savefig(path, dpi=100, format="png")
    with atomic_write(folder / "scores.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def picture(
    title: str, rate: int, clips: Sequence[tuple[str, dict[str, float]]], use: CodebookUse, shown: Scored
) -> Figure:
    """One clip's spectrograms, before and after; how the clips' scores are spread; how often codes are chosen."""
    figure = Figure(figsize=(14, 9), layout="constrained")
    figure.suptitle(title)
    halves: Any = figure.subfigures(2, 1, height_ratios=[3, 2])
    above, below = halves
    above.suptitle(shown.id)
    spectrograms(above, {"original": shown.audio, "decoded": shown.decoded}, rate)
    axes: Any = below.subplots(1, len(METRICS) + 1)
    for ax, (name, what) in zip(axes, METRICS.items(), strict=False):
        values = [scores[name] for _, scores in clips if not math.isnan(scores[name])]
        ax.hist(values, bins=20, color="tab:purple")
        ax.set_xlabel(what.partition(",")[0])
    axes[0].set_ylabel("clips")
    for i, counts in enumerate(use.counts):
        axes[-1].plot(np.sort(counts)[::-1] / max(1, counts.sum()) * counts.size, label=f"level {i}")
    axes[-1].set(xlabel="rows, sorted by use", ylabel="of their equal share", yscale="symlog")
    axes[-1].legend()
    return figure
