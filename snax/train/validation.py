"""Evaluation on held-out clips during training."""

import itertools

import numpy as np
from jaxtyping import Float

from ..codec.model import SNAC
from ..evaluate import metrics
from ..inference.packing import decode_many, encode_many
from .data import Stored, whole_clips

# Clips of which audio and spectrograms are kept.
_SHOWN = 3

Pair = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]


def validate(model: SNAC, held_out: Stored, count: int) -> tuple[dict[str, float], list[Pair]]:
    """The mean scores of the first `count` clips, decoded without noise, and a few clips with their reconstructions."""
    rate = model.config.sampling_rate
    clips = list(itertools.islice(whole_clips(held_out), count))
    decoded = list(decode_many(model, encode_many(model, iter(clips))))
    scores = [metrics.scores(reconstruction, clip, rate) for reconstruction, clip in zip(decoded, clips, strict=True)]
    means = {name: metrics.mean(score[name] for score in scores) for name in scores[0]}
    return means, list(zip(clips, decoded, strict=True))[:_SHOWN]
