"""Score clips or report on them, with decoder processes that read the audio."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .. import compilation_cache
from ..atomic import atomic_write
from ..codec.model import SNAC
from ..data import audio, corpus, reading
from ..data.decoding import DecoderPool
from ..weights import pretrained
from . import report as html
from . import scores
from .scoring import CodebookUse, Scored, score

_log = logging.getLogger(__name__)


class _Clips(NamedTuple):
    model: SNAC
    use: CodebookUse  # counts the codes of the clips so far
    unreadable: list[str]  # problems of the clips so far
    scored: Iterator[Scored]


def evaluate(inputs: Sequence[str], model_name: str, out: Path | None, *, as_json: bool) -> bool:
    """Print the scores of a model, and write them to `out`. Returns whether clips could not be read."""
    with _scored(inputs, model_name) as clips:
        rate = clips.model.config.sampling_rate
        metrics: list[tuple[str, dict[str, float]]] = []
        seconds, shown = 0.0, None
        for clip in clips.scored:
            metrics.append((clip.id, clip.scores))
            seconds += clip.audio.size / rate
            # The figure shows the first clip that is longer than three seconds, if there is one.
            if shown is None or (shown.audio.size < 3 * rate < clip.audio.size):
                shown = clip
    if shown is None:
        raise ValueError(f"none of the {len(clips.unreadable)} clips can be read.")
    summary = scores.summary(clips.model, [values for _, values in metrics], seconds, clips.use)
    summary |= {"model": model_name, "unreadable": clips.unreadable}
    print(json.dumps(summary) if as_json else scores.table(summary))
    if out is not None:
        scores.write(out, summary, metrics, scores.picture(model_name, rate, metrics, clips.use, shown))
    return bool(clips.unreadable)


def report(inputs: Sequence[str], model_name: str, out: Path) -> bool:
    """Write an HTML page with all clips. Returns whether clips could not be read."""
    if out.exists():
        raise ValueError(f"{out} exists. Choose another name with --out.")
    with _scored(inputs, model_name) as clips:
        page = html.page(model_name, clips.model.config, clips.scored)
    with atomic_write(out) as path:
        path.write_text(page, encoding="utf-8")
    print(f"{out}, {len(page) / 1e6:.1f} MB. Open it in a browser.")
    return bool(clips.unreadable)


@contextlib.contextmanager
def _scored(inputs: Sequence[str], model_name: str) -> Iterator[_Clips]:
    """Load the model and start decoder processes. Clips are scored as the result's iterator is consumed."""
    compilation_cache.enable()
    model = pretrained.load(model_name)
    rate = model.config.sampling_rate
    sources = [source for shard in corpus.plan(inputs, 1000) for source in shard]
    decoders = DecoderPool(os.cpu_count() or 1, rate, separate=False, max_seconds=audio.MAX_SECONDS)
    use, unreadable = CodebookUse(model), list[str]()

    def clips() -> Iterator[tuple[str, np.ndarray]]:
        contents = (content for source in sources for content in reading.clips(source))
        for clip, (samples, _) in decoders.map(contents):
            if isinstance(samples, reading.Unreadable):
                unreadable.append(f"{clip.id}: {samples.reason}")
                _log.error("%s cannot be read: %s", clip.id, samples.reason)
            else:
                yield clip.id, samples[0]

    def scored() -> Iterator[Scored]:
        for clip in score(model, clips(), use):
            bar.update()
            yield clip

    try:
        with tqdm(unit="clip", disable=None) as bar:
            yield _Clips(model, use, unreadable, scored())
    finally:
        decoders.close()
