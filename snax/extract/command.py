"""The command `snax extract`."""

import json
import sys
from typing import Annotated, Any

from cyclopts import Parameter

from .. import extras
from .config import ExtractConfig, RayOptions


def extract(
    config: ExtractConfig,
    *,
    ray: RayOptions = RayOptions(),
    json_lines: Annotated[bool, Parameter(name="--json")] = False,
) -> int:
    """Tokenize a corpus.

    Args:
        json_lines: Print a line of JSON for each shard, and one for the totals.
    """
    try:
        from .. import compilation_cache, distributed, signals
        from . import run
    except ImportError as error:
        raise extras.missing(error, "extract") from error
    signals.exit_on_sigterm()

    def report(event: dict[str, Any]) -> None:
        if json_lines:
            print(json.dumps(event), flush=True)

    if ray.workers:
        try:
            from . import cluster
        except ImportError as error:
            raise extras.missing(error, "cluster") from error
        print(_describe(cluster.extract(config, ray, report), config.out), file=sys.stderr)
        return 0

    import jax

    from ..weights import pretrained

    compilation_cache.enable()
    distributed.join(None, None, None)
    with signals.exit_on_error():
        summary = run.extract(pretrained.load(config.model), config, report)
    if jax.process_index() == 0:
        print(_describe(summary, config.out), file=sys.stderr)
    return 0


def _describe(summary: dict[str, Any], out: str) -> str:
    total, seconds, quarantined = summary["total"], summary["seconds"], summary["total"]["quarantined"]
    lines = [
        f"{total['clips']} clips: {total['committed']} in {len(total['shards'])} shard(s) of {out}, {quarantined} in "
        "quarantine" + (f" (see {out}/_quarantine.jsonl)" if quarantined else ""),
        f"{total['hours']:.2f} hours of audio, {total['tokens']:,} codes",
    ]
    if summary["shards"]:
        lines += [
            f"this run, process 0: {summary['hours']:.2f} hours in {seconds['all']:.0f} s, "
            f"{summary['x_real_time']:.1f} x real time; waited {seconds['waiting for decoders']:.0f} s for decoders "
            f"and {seconds['waiting for writes']:.0f} s for writes",
            f"{summary['packing_efficiency']:.1%} of the computed frames belong to clips",
        ]
    return "\n".join(lines)
