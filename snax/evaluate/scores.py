"""Output of `snax eval`: a summary, its table, files with the scores of all clips, and a figure."""

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

# The name, the range and the direction of each metric. Its label in figures ends at the first comma.
METRICS = {
    "mel": "mel distance, lower is better",
    "stft": "STFT distance, lower is better",
    "si_sdr": "SI-SDR in dB, higher is better",
    "stoi": "STOI, 0 to 1, higher is better",
    "pesq": "PESQ, 1 to 4.6, higher is better",
}


def summary(model: SNAC, clips: Sequence[dict[str, float]], seconds: float, use: CodebookUse) -> dict[str, Any]:
    """Return a JSON-serializable summary of the metrics and the use of the codebooks.

    Args:
        model: the codec.
        clips: the metrics of each clip.
        seconds: duration of all clips.
        use: counts of the codes of all clips.
    """
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


def table(results: dict[str, Any]) -> str:
    """Return a summary as a text table."""
    lines = [f"{results['clips']} clips, {results['seconds']:.1f} s"]
    lines.append(f"{'':34}{'mean':>8}   {'quartiles':>18}  clips")
    for name, description in METRICS.items():
        values = results["metrics"][name]
        low, high = values["quartiles"]
        measured = f"{values['mean']:8.3f}   {low:7.3f} to {high:7.3f}" if values["clips"] else f"{'-':>8}{'':22}"
        lines.append(f"{description:34}{measured}  {values['clips']:5}")
    for i, level in enumerate(results["levels"]):
        lines.append(
            f"level {i}: {level['codes_per_second']:.1f} codes per second, {level['used']:.1%} of the codebook used, "
            f"{level['entropy']:.2f} bits of entropy per code"
        )
    lines.append(
        f"bit rate {results['bitrate'] / 1000:.2f} kbps, entropy of the codes "
        f"{results['information_rate'] / 1000:.2f} kbps"
    )
    return "\n".join(lines)


def write(
    folder: Path, results: dict[str, Any], clips: Sequence[tuple[str, dict[str, float]]], picture: Figure
) -> None:
    """Write `scores.json` (the summary), `clips.jsonl` (one line per clip) and `scores.png`.

    Args:
        folder: the output directory, which is created if it does not exist.
        results: the summary.
        clips: name and metrics of each clip. NaN is written as null.
        picture: the figure.
    """
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
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def picture(
    title: str, rate: int, clips: Sequence[tuple[str, dict[str, float]]], use: CodebookUse, shown: Scored
) -> Figure:
    """Return a figure with one clip's spectrograms, the distributions of all metrics and the use of the codebooks.

    Args:
        title: title of the figure.
        rate: sampling rate in Hz.
        clips: name and metrics of each clip.
        use: counts of the codes of all clips.
        shown: the clip whose spectrograms are shown.
    """
    figure = Figure(figsize=(14, 9), layout="constrained")
    figure.suptitle(title)
    halves: Any = figure.subfigures(2, 1, height_ratios=[3, 2])
    above, below = halves
    above.suptitle(shown.id)
    spectrograms(above, {"original": shown.audio, "decoded": shown.decoded}, rate)
    axes: Any = below.subplots(1, len(METRICS) + 1)
    for ax, (name, description) in zip(axes, METRICS.items(), strict=False):
        values = [scores[name] for _, scores in clips if not math.isnan(scores[name])]
        ax.hist(values, bins=20, color="tab:purple")
        ax.set_xlabel(description.partition(",")[0])
    axes[0].set_ylabel("clips")
    for i, counts in enumerate(use.counts):
        axes[-1].plot(np.sort(counts)[::-1] / max(1, counts.sum()) * counts.size, label=f"level {i}")
    axes[-1].set(xlabel="codebook entries, sorted by use", ylabel="use / uniform use", yscale="symlog")
    axes[-1].legend()
    return figure
