"""Evaluation on held-out clips during training."""

import itertools

import numpy as np
from jaxtyping import Float

from ..codec.model import SNAC
from ..evaluate import metrics
from ..inference.packing import decode_many, encode_many
from .data import DecodedCorpus, whole_clips

# The number of clips of which audio and spectrograms are logged.
_NUM_EXAMPLES = 3

Pair = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]


def validate(model: SNAC, held_out: DecodedCorpus, count: int) -> tuple[dict[str, float], list[Pair]]:
    """Score the first `count` held-out clips, decoded without noise.

    Returns:
        The mean of each score over the clips, and a few clips as pairs (original, reconstruction).
    """
    rate = model.config.sampling_rate
    clips = list(itertools.islice(whole_clips(held_out), count))
    decoded = list(decode_many(model, encode_many(model, iter(clips))))
    scores = [metrics.scores(reconstruction, clip, rate) for reconstruction, clip in zip(decoded, clips, strict=True)]
    means = {name: metrics.mean(score[name] for score in scores) for name in scores[0]}
    return means, list(zip(clips, decoded, strict=True))[:_NUM_EXAMPLES]
