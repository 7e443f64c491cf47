"""Errors for invalid input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small

import snax

pytestmark = pytest.mark.usefixtures("as_users_see_it")


@pytest.fixture(scope="module")
def model() -> snax.SNAC:
    return small.model()


AUDIO = small.audio()
BAD_AUDIO = {
    "samples only": (AUDIO[0, 0], r"got \(320,\)\. For one clip pass `audio\[None, None\]`"),
    "no batch": (AUDIO[0], r"got \(1, 320\)\. For one clip of shape \(1, samples\) pass `audio\[None\]`"),
    "rank 4": (AUDIO[None], r"must be \(batch, 1, samples\), got \(1, 1, 1, 320\)\."),
    "stereo": (AUDIO.repeat(2, axis=1), r"must be mono.*got \(1, 2, 320\)\. Mix the channels"),
    "empty": (AUDIO[..., :0], r"at least one sample, got \(1, 1, 0\)"),
    "integers": ((AUDIO * 32767).astype(np.int16), "floating point, got int16. Scale"),
    "NaN": (np.where(AUDIO > 0.5, np.nan, AUDIO), r"finite, got NaN or infinity in \d+ of 320 places"),
    "infinity on the device": (jnp.asarray(AUDIO).at[0, 0, 3].set(jnp.inf), "in 1 of 320 places"),
    "float64 beyond float32": (np.full((1, 1, 320), 1e300), "in 320 of 320 places"),
    "a list": ([0.0, 1.0], "must be a JAX or NumPy array, got builtins.list"),
}


@pytest.mark.parametrize("name", BAD_AUDIO)
@pytest.mark.parametrize("method", ["encode", "__call__", "audio_to_latents"])
def test_rejects_invalid_audio(model: snax.SNAC, name: str, method: str) -> None:
    audio, message = BAD_AUDIO[name]
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(audio)


CODES = [np.zeros((1, 10), np.int32), np.zeros((1, 20), np.int32), np.zeros((1, 40), np.int32)]
BAD_CODES: dict[str, tuple[Any, str]] = {
    "missing level": (CODES[:2], "3 arrays, coarse to fine, got 2 items"),
    "one array": (CODES[0], "3 arrays, coarse to fine, got ndarray"),
    "fine to coarse": (CODES[::-1], r"same clips and time at every level.*\[\(1, 40\), \(1, 80\), \(1, 160\)\], got"),
    "missing frame": ([*CODES[:2], CODES[2][:, :-1]], r"have .*\[\(1, 10\), \(1, 20\), \(1, 40\)\], got"),
    "different batch sizes": ([*CODES[:2], CODES[2].repeat(2, axis=0)], "same clips"),
    "no frames": ([level[:, :0] for level in CODES], "same clips"),
    "no batch": ([level[0] for level in CODES], r"`codes\[0\]` must be \(batch, frames\), got \(10,\)"),
    "floats": ([level.astype(np.float32) for level in CODES], r"`codes\[0\]` must be an array of .* got float32"),
    "lists": ([level.tolist() for level in CODES], r"`codes\[0\]` must be an array of integers, got <class 'list'>"),
    "too large": (
        [*CODES[:2], CODES[2] + 64],
        r"`codes\[2\]` must be between 0 and .* \(=63\), got values from 64 to 64",
    ),
    "negative": ([CODES[0] - 1, *CODES[1:]], r"`codes\[0\]` must be between .* got values from -1 to -1"),
    "too large on the device": ([*CODES[:2], jnp.asarray(CODES[2]).at[0, 7].set(99)], "got values from 0 to 99"),
}


@pytest.mark.parametrize("name", BAD_CODES)
@pytest.mark.parametrize("method", ["decode", "dequantize"])
def test_rejects_invalid_codes(model: snax.SNAC, name: str, method: str) -> None:
    codes, message = BAD_CODES[name]
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(codes)


LATENTS = np.zeros((1, 8, small.CONFIG.latent_dim), np.float32)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (LATENTS.swapaxes(1, 2), r"must be \(batch, frames, 32\), got \(1, 32, 8\)"),
        (LATENTS[0], r"must be \(batch, frames, 32\), got \(8, 32\)"),
        (LATENTS[:, :0], r"got \(1, 0, 32\)"),
        (LATENTS.astype(np.int32), "floating point, got int32"),
        (LATENTS + np.nan, "finite, got NaN or infinity in 256 of 256 places"),
    ],
)
@pytest.mark.parametrize("method", ["quantize", "latents_to_audio"])
def test_rejects_invalid_latents(model: snax.SNAC, latents: np.ndarray, message: str, method: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(latents)


def test_rejects_number_of_latents_that_strides_do_not_divide(model: snax.SNAC) -> None:
    with pytest.raises(ValueError, match=r"`latents` \(=7\) must be a multiple of each of `vq_strides`"):
        model.quantize(LATENTS[:, :7])


def test_jit_checks_shapes_and_clamps_codes(model: snax.SNAC) -> None:
    with pytest.raises(ValueError, match=r"audio\[None\]"):
        jax.jit(model.encode)(AUDIO[0])
    decoded = jax.jit(model.decode)([level + 99 for level in CODES])
    np.testing.assert_allclose(decoded, model.decode([level + 63 for level in CODES]), rtol=0, atol=1e-6)  # clamped


def test_rejects_unequal_attention_windows() -> None:
    config = dataclasses.replace(small.CONFIG, latent_dim=0, encoder_dim=16, decoder_dim=64, attn_window_size=8)
    codes = [np.zeros((1, 20 // stride), np.int32) for stride in config.vq_strides]
    small.model(config).decode(codes)  # as in the reference: two windows of 10
    with pytest.raises(ValueError, match=r"Cannot divide 28 latent frames into equal windows of at least .*\(=8\)"):
        small.model(config).decode([np.zeros((1, 28 // stride), np.int32) for stride in (4, 2, 1)])


def test_rejects_unknown_precision() -> None:
    with pytest.raises(ValueError, match="highest"):
        snax.SNAC(small.CONFIG, precision="exact", rngs=small.rngs())


def test_rejects_invalid_codes_among_host_device_and_traced_levels() -> None:
    model = small.model()
    codes = [np.asarray(level) for level in model.encode(small.audio())]
    wide = codes[0].astype(np.uint64) + 2**32  # valid codes after wrapping to 32 bits
    with pytest.raises(ValueError, match=r"`codes\[0\]` must be between 0 and"):
        model.decode([wide, *map(jnp.asarray, codes[1:])])
    with pytest.raises(ValueError, match=r"`codes\[1\]` must be between 0 and"):
        jax.jit(lambda level: model.decode([level, codes[1] + 64, codes[2]]))(codes[0])
    with pytest.raises(ValueError, match=r"`codes\[2\]` must be between 0 and"):
        model.decode([jnp.asarray(codes[0]), codes[1], jnp.asarray(codes[2] - 64)])
