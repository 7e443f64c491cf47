"""`snax eval` and `snax report`: their options, and what they print."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .. import extras
from ..atomic import atomic_write
from ..codec.model import SNAC
from ..data import audio
from ..weights import pretrained

if TYPE_CHECKING:  # what is imported needs snax-codec[eval]
    from .scoring import CodebookUse, Scored

_INPUTS = "audio files, folders, patterns, manifests (.jsonl, .csv, .parquet), tables with audio (.parquet), tars; URLs"


def add(commands: Any) -> None:
    """Adds both commands to a parser's."""

    def command(name: str, run: Any, what: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
        parser.set_defaults(run=run)
        parser.add_argument("inputs", nargs="+", metavar="INPUT", help=_INPUTS)
        named = "name, folder, URL or hub id (default: snac_24khz)"
        parser.add_argument("-m", "--model", default="snac_24khz", help=named)
        return parser

    what = "How good a model is on given audio: distances, STOI, PESQ, codebook use; a table and a picture."
    parser = command("eval", _eval, what)
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="for scores.json, clips.jsonl and scores.png")
    parser.add_argument("--json", action="store_true", help="the summary as JSON, instead of the table")
    what = "What a model does to given audio: a page of HTML to listen to and to look at, with the codes as they play."
    parser = command("report", _report, what)
    out = "default: report.html, which must not be there"
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", default=Path("report.html"), help=out)


def _eval(arguments: argparse.Namespace) -> int:
    with _scored(arguments) as (model, use, unreadable, clips):
        from . import scores as report

        rate = model.config.sampling_rate
        scored: list[tuple[str, dict[str, float]]] = []
        seconds, shown = 0.0, None
        for each in clips:
            scored.append((each.id, each.scores))
            seconds += each.audio.size / rate
            # The picture is of the first clip that is long enough to see something.
            if shown is None or (shown.audio.size < 3 * rate < each.audio.size):
                shown = each
    if shown is None:
        raise ValueError(f"none of {len(unreadable)} clips can be read.")
    found = report.summary(model, [scores for _, scores in scored], seconds, use)
    found |= {"model": arguments.model, "unreadable": unreadable}
    print(json.dumps(found) if arguments.json else report.table(found))
    if arguments.out is not None:
        report.write(arguments.out, found, scored, report.picture(arguments.model, rate, scored, use, shown))
    return int(bool(unreadable))


def _report(arguments: argparse.Namespace) -> int:
    if arguments.out.exists():
        raise ValueError(f"{arguments.out} is already there: give another name with --out.")
    with _scored(arguments) as (model, _, unreadable, clips):
        from . import report as page

        content = page.page(arguments.model, model.config, clips)
    with atomic_write(arguments.out) as path:
        path.write_text(content, encoding="utf-8")
    print(f"{arguments.out}, {len(content) / 1e6:.1f} MB: open it in a browser.")
    return int(bool(unreadable))


@contextlib.contextmanager
def _scored(arguments: argparse.Namespace) -> Iterator[tuple[SNAC, "CodebookUse", list[str], Iterator["Scored"]]]:
    """The model, the use of its codebooks and what could not be read, both of which grow, and the clips' scores."""
    try:
        import pesq  # noqa: F401  # missing, it should be missed here and not at the first clip

        from ..data import corpus, decoding, reading
        from . import scoring as score
    except ImportError as error:
        raise extras.missing(error, "eval") from error
    model = pretrained.load(arguments.model)
    rate = model.config.sampling_rate
    pieces = [piece for shard in corpus.plan(arguments.inputs, 1000) for piece in shard]
    decoders = decoding.DecoderPool(os.cpu_count() or 1, rate, separate=False, max_seconds=audio.MAX_SECONDS)
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

    def scored() -> Iterator["Scored"]:
        for each in score.score(model, clips(), use):
            bar.update()
            yield each

    try:
        with tqdm(unit="clip", disable=None) as bar:
            yield model, use, unreadable, scored()
    finally:
        decoders.close()
