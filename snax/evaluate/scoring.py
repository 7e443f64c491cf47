"""Reconstruction of clips with a model, with the metrics of each clip and the use of the codebooks."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from ..codec.model import SNAC
from ..inference.packing import EncodedClip, decode_many, encode_many
from . import metrics


class Scored(NamedTuple):
    """A clip with its codes, its reconstruction and its metrics by name."""

    id: str
    audio: Float[np.ndarray, " samples"]
    codes: Sequence[Integer[np.ndarray, " _"]]
    decoded: Float[np.ndarray, " samples"]
    scores: dict[str, float]


class CodebookUse:
    """Counts of how often each entry of each codebook is chosen."""

    def __init__(self, model: SNAC):
        size, levels = model.config.codebook_size, len(model.config.vq_strides)
        self.counts: Int[np.ndarray, "levels codebook_size"] = np.zeros((levels, size), np.int64)
        self._code_rates = model.config.code_rates

    def add(self, clip: EncodedClip) -> None:
        """Count the codes of a clip."""
        for counts, codes in zip(self.counts, clip.codes, strict=True):
            counts += np.bincount(codes, minlength=counts.size)

    @property
    def used(self) -> list[float]:
        """The fraction of each codebook's entries that were chosen at least once."""
        return (self.counts > 0).mean(axis=1).tolist()

    @property
    def entropies(self) -> list[float]:
        """The entropy of a single code of each level in bits. It is underestimated if few codes were counted."""
        shares = self.counts / np.maximum(1, self.counts.sum(axis=1, keepdims=True))
        return (0.0 - np.where(shares > 0, shares * np.log2(np.where(shares > 0, shares, 1)), 0).sum(axis=1)).tolist()

    @property
    def information_rate(self) -> float:
        """The bit rate in bits per second of an ideal entropy coder for single codes."""
        return math.fsum(rate * bits for rate, bits in zip(self._code_rates, self.entropies, strict=True))


def score(
    model: SNAC, clips: Iterable[tuple[str, Float[np.ndarray, " samples"]]], use: CodebookUse
) -> Iterator[Scored]:
    """Encode and decode clips without noise, and compute their metrics.

    Args:
        model: the codec.
        clips: name and mono audio of each clip.
        use: counts the codes of all clips.

    Yields:
        Each clip with its codes, its reconstruction and its metrics, in order.
    """
    originals, to_encode = itertools.tee(clips)

    def counted() -> Iterator[EncodedClip]:
        for clip in encode_many(model, (audio for _, audio in to_encode)):
            use.add(clip)
            yield clip

    codes, to_decode = itertools.tee(counted())
    for (name, audio), clip, decoded in zip(originals, codes, decode_many(model, to_decode), strict=True):
        scores = metrics.scores(decoded, audio, model.config.sampling_rate, with_pesq=True)
        yield Scored(name, audio, [np.asarray(level) for level in clip.codes], decoded, scores)
