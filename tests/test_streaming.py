"""Streaming equals the reference on the whole input, from the first to the last frame."""

import math
from unittest import mock

import jax
import numpy as np
import pytest
from helpers import small
from helpers.pairs import pair, torch_decode, torch_encode
from hypothesis import given, settings
from hypothesis import strategies as st

import snax
from snax.inference import steps

KEY = jax.random.key(5)
# For float32 rounding, as in test_packing.
AUDIO_BOUND = 1e-5

NAMES = [
    "depthwise, noise",
    "attention of two heads, window longer than the strides",
    "window that shares no factor with the strides",
    "odd rates, dense",
    "the reference's default rates",
    "strides that share no factor",
    "single rate, single level",
]


def split(arrays: list[np.ndarray], widths: list[int], counts: list[int]) -> list[list[np.ndarray]]:
    """Split (batch, time) arrays into chunks of `counts` frames, cyclically. Each array has its own width per frame."""
    chunks, start, total = [], 0, -(-arrays[0].shape[1] // widths[0])
    while start < total:
        count = counts[len(chunks) % len(counts)]
        chunks.append([x[:, start * n : (start + count) * n] for x, n in zip(arrays, widths, strict=True)])
        start += count
    return chunks


def decode(
    model: snax.SNAC,
    codes: list[np.ndarray],
    counts: list[int],
    *,
    lookahead: int | None = None,
    key: jax.Array | None = None,
) -> list[np.ndarray]:
    """Decode in chunks of `counts` coarse frames. Return the audio of each step and of `flush`."""
    decoder, strides = snax.StreamDecoder(model, lookahead=lookahead), model.config.vq_strides
    state, audio = decoder.init_state(len(codes[0]), key=key), []
    for chunk in split(codes, [math.lcm(*strides) // stride for stride in strides], counts):
        state, new = decoder.step(state, chunk)
        audio.append(new)
    return [*audio, decoder.flush(state)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), samples=st.integers(1, 5000))
def test_streams_match_reference(name: str, counts: list[int], samples: int) -> None:
    torch_model, model, speech = pair(name)
    clip = speech[0, 0, 3000 : 3000 + samples]
    expected = torch_encode(torch_model, clip, model.config.pad_multiple)

    encoder = snax.StreamEncoder(model)
    state, streamed = encoder.init_state(), []
    for (chunk,) in split([clip[None]], [100], [3 * count for count in counts]):
        state, codes = encoder.step(state, chunk[:, None])
        streamed.append(codes)
    streamed.append(encoder.flush(state))
    for chunks, expected_level in zip(zip(*streamed, strict=True), expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1)[0], expected_level)

    audio = np.concatenate(decode(model, [level[None] for level in expected], counts), axis=2)
    np.testing.assert_allclose(audio[0, 0], torch_decode(torch_model, expected), rtol=0, atol=AUDIO_BOUND)


def encode(model: snax.SNAC, batch: int = 1, blocks: int = 30) -> list[np.ndarray]:
    return [np.asarray(x) for x in model.encode(small.audio(batch=batch, samples=blocks * model.config.pad_multiple))]


def test_noise_equals_that_of_decode() -> None:
    model = small.model()
    codes = encode(model, batch=2)
    keys = jax.random.split(KEY, 2)
    audio = np.concatenate(decode(model, codes, [1, 3], key=keys), axis=2)
    np.testing.assert_allclose(audio, model.decode(codes, key=keys), rtol=0, atol=AUDIO_BOUND)
    assert np.abs(audio - model.decode(codes)).max() > 1e-3


def test_batched_streams_are_independent() -> None:
    model = small.model()
    codes = encode(model, batch=3)
    batched = np.concatenate(decode(model, codes, [2]), axis=2)
    for i in range(3):
        alone = np.concatenate(decode(model, [level[i : i + 1] for level in codes], [5]), axis=2)
        np.testing.assert_allclose(batched[i : i + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lookahead", [None, 0, 3])
def test_latency(lookahead: int | None) -> None:
    model = small.model()
    decoder = snax.StreamDecoder(model, lookahead=lookahead)
    codes = encode(model)
    *steps, _ = decode(model, codes, [1], lookahead=lookahead)
    returned = np.cumsum([audio.shape[2] for audio in steps])
    received = (1 + np.arange(30)) * small.PAD
    np.testing.assert_array_equal(returned, np.maximum(0, received - decoder.latency))
    if lookahead is not None:
        assert decoder.latency == lookahead * small.HOP


def test_latency_is_that_of_the_network() -> None:
    """`latency` is the distance at which a changed code changes a sample, rounded up by less than a frame per block."""
    model = small.model()
    codes = encode(model)
    changed = [level.copy() for level in codes]
    changed[-1][0, 80] = (changed[-1][0, 80] + 1) % small.CONFIG.codebook_size
    first = np.flatnonzero(np.asarray(model.decode(codes) != model.decode(changed))[0, 0])[0]
    distance = 81 * small.HOP - first
    assert distance - small.HOP <= snax.StreamDecoder(model).latency <= distance + 2 * small.HOP


def test_longer_lookahead_reduces_the_error() -> None:
    model = small.model()
    codes = encode(model)
    whole = np.asarray(model.decode(codes))
    max_lookahead = -(-snax.StreamDecoder(model).latency // small.HOP)
    errors = []
    for lookahead in (0, max_lookahead // 2, max_lookahead):
        audio = np.concatenate(decode(model, codes, [1], lookahead=lookahead), axis=2)
        assert audio.shape == whole.shape
        errors.append(float(np.sqrt(np.square(audio - whole).mean())))
    assert errors[0] > errors[1] > 1e-4 > AUDIO_BOUND > errors[2]


def test_only_first_step_and_flush_compile() -> None:
    model = small.variant("plain convolutions, odd rates")
    codes = encode(model)
    with mock.patch.object(steps, "step_layers", wraps=steps.step_layers) as traced:
        decode(model, codes, [1])
        compiled = traced.call_count
        decode(model, codes, [3, 1, 8])
    assert traced.call_count == compiled > 0


def test_state_is_an_immutable_pytree() -> None:
    model = small.model()
    decoder, codes = snax.StreamDecoder(model), encode(model)
    halves = split(codes, [1, 2, 4], [15])
    state, _ = decoder.step(decoder.init_state(), halves[0])
    copied = jax.tree.map(np.array, state)
    _, audio = decoder.step(state, halves[1])
    _, again = decoder.step(copied, halves[1])
    np.testing.assert_array_equal(audio, again)
    jax.tree.map(np.testing.assert_array_equal, state, copied)


def test_long_stream_does_not_overflow() -> None:
    """After ten days, a sample count would have overflowed 32 bits."""
    model = small.model()
    decoder, codes = snax.StreamDecoder(model), encode(model)
    state, _ = decoder.step(decoder.init_state(), codes)
    late = state._replace(frames=10 * 24 * 3600 * small.CONFIG.sampling_rate // small.PAD * 4)
    np.testing.assert_array_equal(decoder.step(late, codes)[1], decoder.step(state, codes)[1])


@pytest.mark.usefixtures("as_users_see_it")
def test_rejects_invalid_input() -> None:
    model = small.model()
    decoder, codes = snax.StreamDecoder(model), encode(model)
    with pytest.raises(ValueError, match=r"`lookahead` \(=-1\) must be between 0 and"):
        snax.StreamDecoder(model, lookahead=-1)
    with pytest.raises(ValueError, match=r"batch size \(=1\) must be that of the state, 2"):
        decoder.step(decoder.init_state(2), codes)
    with pytest.raises(ValueError, match=r"`codes\[2\]` must be between 0"):
        decoder.step(decoder.init_state(), [*codes[:2], codes[2] + 64])
    with pytest.raises(ValueError, match=r"`audio` must be \(batch, 1, samples\)"):
        snax.StreamEncoder(model).step(decoder.init_state(), np.zeros(5, np.float32))
    windowed = pair("attention of two heads, window longer than the strides")[1]
    decoder = snax.StreamDecoder(windowed)
    state, audio = decoder.step(decoder.init_state(), [np.zeros((1, n), np.int32) for n in (2, 4, 8)])
    assert audio.shape == (1, 1, 0)
    with pytest.raises(ValueError, match="ends 8 latent frames into an attention window of 12"):
        decoder.flush(state)
