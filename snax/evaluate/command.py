"""`snax eval`: its options, and what it prints."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .. import audio, pretrained

_INPUTS = "audio files, folders, patterns, manifests (.jsonl, .csv, .parquet), tables with audio (.parquet), tars; URLs"


def add(commands: Any) -> None:
    """Adds the command to a parser's."""
    what = "How good a model is on given audio: distances, STOI, PESQ, codebook use; a table and a picture."
    parser = commands.add_parser("eval", help=what, description=what)
    parser.set_defaults(run=_run)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=_INPUTS)
    parser.add_argument("-m", "--model", default="snac_24khz", help="name, folder, URL or hub id (default: snac_24khz)")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="for scores.json, clips.jsonl and scores.png")
    parser.add_argument("--json", action="store_true", help="the summary as JSON, instead of the table")


def _run(arguments: argparse.Namespace) -> int:
    try:
        from ..extract import corpus, decoding, reading
        from . import report, score
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'snax-codec[train]'.") from error
    model = pretrained.load(arguments.model)
    rate = model.config.sampling_rate
    pieces = [piece for shard in corpus.plan(arguments.inputs, 1000) for piece in shard]
    decoders = decoding.Decoders(os.cpu_count() or 1, rate, separate=False, max_seconds=audio.MAX_SECONDS)
    unreadable: list[str] = []

    def clips() -> Iterator[tuple[str, np.ndarray]]:
        contents = (pair for piece in pieces for pair in reading.clips(piece))
        for clip, (samples, _) in decoders.map(contents):
            if isinstance(samples, reading.Unreadable):
                unreadable.append(f"{clip.id}: {samples.reason}")
                bar.write(f"snax: {clip.id} can't be read: {samples.reason}", file=sys.stderr)
            else:
                yield clip.id, samples[0]

    use = score.CodebookUse(model)
    scored: list[tuple[str, dict[str, float]]] = []
    seconds, shown = 0.0, None
    try:
        with tqdm(unit="clip", disable=None) as bar:
            for each in score.score(model, clips(), use):
                scored.append((each.id, each.scores))
                seconds += each.audio.size / rate
                bar.update()
                # The picture is of the first clip that is long enough to see something.
                if shown is None or (shown.audio.size < 3 * rate < each.audio.size):
                    shown = each
    finally:
        decoders.close()
    if shown is None:
        raise ValueError(f"none of {len(unreadable)} clips can be read.")
    found = report.summary(model, [scores for _, scores in scored], seconds, use)
    found |= {"model": arguments.model, "unreadable": unreadable}
    print(json.dumps(found) if arguments.json else report.table(found))
    if arguments.out is not None:
        report.write(arguments.out, found, scored, report.picture(arguments.model, rate, scored, use, shown))
    return int(bool(unreadable))
