"""Small models with random parameters, for tests in which the size does not matter."""

import dataclasses
import functools
from typing import Any

import numpy as np
from flax import nnx

import snax

CONFIG = snax.SNACConfig(
    sampling_rate=16000,
    encoder_dim=8,
    encoder_rates=(2, 4),
    decoder_dim=16,
    decoder_rates=(4, 2),
    attn_window_size=None,
    codebook_size=64,
    vq_strides=(4, 2, 1),
)
# Fields that differ from `CONFIG`.
CONFIGS: dict[str, dict[str, Any]] = {
    "depthwise": {},
    "plain convolutions, odd rates": {"depthwise": False, "encoder_rates": (3, 5), "decoder_rates": (5, 3)},
    "decoder with other rates": {"encoder_rates": (2, 3, 4), "decoder_rates": (2, 4, 3)},
    "attention": {"encoder_dim": 32, "encoder_rates": (4,), "decoder_dim": 64, "decoder_rates": (4,)}
    | {"attn_window_size": 4},
}
HOP, PAD = CONFIG.hop_length, CONFIG.pad_multiple


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


@functools.cache
def model(config: snax.SNACConfig = CONFIG) -> snax.SNAC:
    return snax.SNAC(config, rngs=rngs())


def variant(name: str) -> snax.SNAC:
    """Return the model of one of `CONFIGS`."""
    return model(dataclasses.replace(CONFIG, latent_dim=0, **CONFIGS[name]))


def audio(batch: int = 1, samples: int = 10 * PAD, seed: int = 0) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).standard_normal((batch, 1, samples), np.float32)
