"""`snax extract`: its options, its exit codes, its last words."""

import argparse
import functools
import json
import sys
from typing import Any

import jax

from .. import extras
from ..data import audio
from ..weights import pretrained

_INPUTS = "audio files, folders, patterns, manifests (.jsonl, .csv, .parquet), tables with audio (.parquet), tars; URLs"
_LAYOUTS = "a column of a language model's tokens: Orpheus' ids, or ids from 0 that slots share or have to themselves"
_BAD = "fraction of clips that can't be read at which to stop, if there are more than ten (default: 0.1)"


def add(commands: Any) -> None:
    """Adds the command to a parser's."""
    what = "A corpus to Parquet shards of codes, on all devices and hosts. Stopped, the same command goes on."
    parser = commands.add_parser("extract", help=what, description=what)
    parser.set_defaults(run=_run)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=_INPUTS)

    def option(*names: str, what: str, **how: Any) -> None:
        parser.add_argument(*names, help=what, **how)

    option("-o", "--out", what="a new folder, or URL, for the shards", required=True, metavar="FOLDER")
    option("-m", "--model", what="name, folder, URL or hub id (default: snac_24khz)", default="snac_24khz")
    option("--channels", what="default: mix to mono", choices=["mix", "separate"], default="mix")
    option("--clips-per-shard", what="clips in a shard (default: 1000)", type=_positive, default=1000, metavar="N")
    option("--tokens", what=_LAYOUTS, choices=["orpheus", "shared", "separate"])
    option("--max-seconds", what="of a clip (default: a day)", type=float, default=audio.MAX_SECONDS, metavar="S")
    option("--max-quarantined", what=_BAD, type=float, default=0.1, metavar="FRACTION")
    option("--retry-quarantined", what="make shards anew that have clips in quarantine", action="store_true")
    option("--num-workers", what="processes that decode (default: one a core)", type=_positive, metavar="N")
    option("--json", what="a line of JSON for each shard, and for the sums, to standard output", action="store_true")
    several = parser.add_argument_group("several processes", "On TPU pods, Slurm and Open MPI they find each other.")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, and a free port there")
    several.add_argument("--num-processes", type=_positive, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _run(arguments: argparse.Namespace) -> int:
    try:
        from .. import distributed, signals
        from . import run
    except ImportError as error:
        raise extras.missing(error, "extract") from error
    signals.exit_on_sigterm()
    distributed.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
    config = run.ExtractConfig(
        inputs=arguments.inputs,
        out=arguments.out,
        model=arguments.model,
        clips_per_shard=arguments.clips_per_shard,
        separate=arguments.channels == "separate",
        tokens=arguments.tokens,
        max_seconds=arguments.max_seconds,
        max_quarantined=arguments.max_quarantined,
        retry_quarantined=arguments.retry_quarantined,
        num_workers=arguments.num_workers,
    )
    report = functools.partial(print, flush=True) if arguments.json else lambda line: None
    with signals.leaving_on_errors():
        model = pretrained.load(arguments.model)
        end = run.extract(model, config, lambda event: report(json.dumps(event)))
    if jax.process_index() == 0:
        print(_last_words(end, config.out), file=sys.stderr)
    return 0


def _last_words(end: dict[str, Any], out: str) -> str:
    total, seconds, bad = end["total"], end["seconds"], end["total"]["quarantined"]
    lines = [
        f"{total['clips']} clips: {total['committed']} in {len(total['shards'])} shard(s) of {out}, "
        f"{bad} that could not be read" + (f" (why: {out}/_quarantine.jsonl)" if bad else ""),
        f"{total['hours']:.2f} hours of audio, {total['tokens']:,} codes",
    ]
    if end["shards"]:
        lines += [
            f"this run, process 0: {end['hours']:.2f} hours in {seconds['all']:.0f} s, {end['x_real_time']:.1f} x real "
            f"time, {seconds['waiting for decoders']:.0f} s of it behind decoders and "
            f"{seconds['waiting for writes']:.0f} s behind writes",
            f"{end['packing_efficiency']:.1%} of the frames computed were those of clips",
        ]
    return "\n".join(lines)
