"""The reference's own answers, from small models that between them reach every branch of it."""

import pytest
from helpers import reference
from helpers.pairs import CONFIGS, pair

# Compiling a gradient takes longest, so only for configurations that between them reach every branch.
GRADIENTS = [
    "depthwise, noise",
    "dense, no noise",
    "attention of two heads, window longer than the strides",
    "odd rates, dense",
    "rate of one",
    "small codebook of few dimensions",
]


@pytest.mark.parametrize("name", CONFIGS)
def test_latents_tokens_and_audio(name: str) -> None:
    reference.assert_same(*pair(name))


@pytest.mark.parametrize(
    "name", [GRADIENTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in GRADIENTS[1:])]
)
def test_gradients(name: str) -> None:
    reference.assert_same_gradients(*pair(name))
