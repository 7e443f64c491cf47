"""A model's scores on clips."""

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
    """A clip's name, its audio, its codes and what became of it, and its scores."""

    id: str
    audio: Float[np.ndarray, " samples"]
    codes: Sequence[Integer[np.ndarray, " _"]]
    decoded: Float[np.ndarray, " samples"]
    scores: dict[str, float]


class CodebookUse:
    """Counts how often each row of each level's codebook is chosen."""

    def __init__(self, model: SNAC):
        size, levels = model.config.codebook_size, len(model.config.vq_strides)
        self.counts: Int[np.ndarray, "levels codebook_size"] = np.zeros((levels, size), np.int64)
        self._code_rates = model.config.code_rates

    def add(self, clip: EncodedClip) -> None:
        for counts, codes in zip(self.counts, clip.codes, strict=True):
            counts += np.bincount(codes, minlength=counts.size)

    @property
    def used(self) -> list[float]:
        """The fraction of each codebook that was chosen at all."""
        return (self.counts > 0).mean(axis=1).tolist()

    @property
    def entropies(self) -> list[float]:
        """Bits that a code of each level carries by itself; few codes make it look smaller than it is."""
        shares = self.counts / np.maximum(1, self.counts.sum(axis=1, keepdims=True))
        return (0.0 - np.where(shares > 0, shares * np.log2(np.where(shares > 0, shares, 1)), 0).sum(axis=1)).tolist()

    @property
    def information_rate(self) -> float:
        """Bits per second if each code took no more than its entropy."""
        return math.fsum(rate * bits for rate, bits in zip(self._code_rates, self.entropies, strict=True))


def score(
    model: SNAC, clips: Iterable[tuple[str, Float[np.ndarray, " samples"]]], use: CodebookUse
) -> Iterator[Scored]:
    """Each clip through the codec, without noise, and its scores; `use` counts the codes."""
    kept, encoded = itertools.tee(clips)

    def counted() -> Iterator[EncodedClip]:
        for clip in encode_many(model, (audio for _, audio in encoded)):
            use.add(clip)
            yield clip

    codes, to_decode = itertools.tee(counted())
    for (name, audio), clip, ours in zip(kept, codes, decode_many(model, to_decode), strict=True):
        scores = metrics.scores(ours, audio, model.config.sampling_rate, with_pesq=True)
        yield Scored(name, audio, [np.asarray(level) for level in clip.codes], ours, scores)
