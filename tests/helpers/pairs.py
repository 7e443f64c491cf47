"""Pairs of small models, the reference and snax, with the same parameters. Together they cover the reference."""

import functools
from typing import Any
from unittest import mock

import numpy as np
import snac
import torch

import snax
from helpers import recordings, reference

SMALL = {
    "sampling_rate": 16000,
    "encoder_dim": 8,
    "encoder_rates": [2, 4],
    "decoder_dim": 48,
    "decoder_rates": [4, 2],
    "attn_window_size": None,
    "codebook_size": 256,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
}
ATTENTION = {"encoder_dim": 16, "decoder_dim": 64, "attn_window_size": 8}

CONFIGS: dict[str, dict[str, Any]] = {
    "depthwise, noise": {},
    "dense": {"depthwise": False},
    "no noise": {"noise": False},
    "dense, no noise": {"depthwise": False, "noise": False},
    "attention": ATTENTION,
    "attention, dense": ATTENTION | {"depthwise": False, "noise": False},
    "attention of two heads, window longer than the strides": ATTENTION
    | {"encoder_dim": 32, "decoder_dim": 192, "attn_window_size": 12},
    "window that shares no factor with the strides": ATTENTION | {"attn_window_size": 3, "vq_strides": [4, 1]},
    "window of one frame": ATTENTION | {"attn_window_size": 1},
    "odd rates": {"encoder_rates": [3, 5], "decoder_rates": [5, 3]},
    "odd rates, dense": {"encoder_rates": [7, 3], "decoder_rates": [3, 7], "depthwise": False},
    "the reference's default rates": ATTENTION
    | {
        "encoder_dim": 8,
        "encoder_rates": [3, 3, 7, 7],
        "decoder_rates": [7, 7, 3, 3],
        "attn_window_size": 32,
        "vq_strides": [8, 4, 2, 1],
    },
    "decoder with other rates": {"encoder_rates": [2, 8], "decoder_rates": [4, 2, 2]},
    "decoder of a width that halves unevenly": {
        "decoder_dim": 27,
        "encoder_rates": [2, 2, 2],
        "decoder_rates": [2, 2, 2],
    },
    "rate of one": {"encoder_rates": [1, 4], "decoder_rates": [4]},
    "rate of one before an odd one": {"encoder_rates": [2, 1, 3], "decoder_rates": [3, 2]},
    "single rate, single level": {"encoder_rates": [4], "decoder_rates": [4], "vq_strides": [1]},
    "equal strides": {"vq_strides": [2, 2, 1, 1]},
    "strides from fine to coarse": {"vq_strides": [1, 2, 4]},
    "strides that share no factor": {"vq_strides": [3, 2]},
    "small codebook of few dimensions": {"codebook_size": 17, "codebook_dim": 3},
    "explicit latent_dim": {"latent_dim": 32},
}


@functools.cache
def pair(name: str) -> tuple[snac.SNAC, snax.SNAC, np.ndarray]:
    """Return the reference and the snax model with the same parameters, and speech of whole pad multiples."""
    config = SMALL | CONFIGS[name]
    # The reference pads only to whole frames of the first level. That is not enough for strides in another order.
    multiple = snax.SNACConfig.from_dict(config).pad_multiple
    samples = max(19200, 6 * multiple) // multiple * multiple
    speech = recordings.clip("speech_7s.wav", config["sampling_rate"], 7)[..., :samples]
    torch_model = reference.trained_like(config, speech)
    reference.assert_behaves_trained(torch_model, speech)
    return torch_model, reference.converted(torch_model, config), speech


def torch_encode(model: snac.SNAC, clip: np.ndarray, pad_multiple: int) -> list[np.ndarray]:
    """Return the reference's codes of a (samples,) clip, one (frames,) array per level.

    The clip is padded to `pad_multiple` here, because the reference pads only to whole frames of the first level.
    """
    padded = np.pad(clip, (0, -len(clip) % pad_multiple))
    with torch.inference_mode():
        return [level[0].numpy() for level in model.encode(torch.from_numpy(padded)[None, None])]


def torch_decode(model: snac.SNAC, codes: list[np.ndarray]) -> np.ndarray:
    """Return the reference's audio, (samples,), of the codes of one clip, without noise."""
    with torch.inference_mode(), mock.patch.object(torch, "randn", torch.zeros):
        return model.decode([torch.from_numpy(level)[None] for level in codes])[0, 0].numpy()
