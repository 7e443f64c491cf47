"""Parity with the reference, for small models that together cover all its branches."""

import pytest
from helpers import reference
from helpers.pairs import CONFIGS, pair

# Gradients take long to compile, so only these configurations, which together cover all branches.
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
