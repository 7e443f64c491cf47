"""Streams end to end against the reference on the whole, first and last frame included."""

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
from snax.inference import streaming

KEY = jax.random.key(5)
# float32's rounding, as in test_packing.
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


def pieces(arrays: list[np.ndarray], each: list[int], counts: list[int]) -> list[list[np.ndarray]]:
    """Arrays (batch, time) cut together: `counts` of their own `each` values at a time, over and over, to the end."""
    cut, at, total = [], 0, -(-arrays[0].shape[1] // each[0])
    while at < total:
        count = counts[len(cut) % len(counts)]
        cut.append([x[:, at * n : (at + count) * n] for x, n in zip(arrays, each, strict=True)])
        at += count
    return cut


def decode(
    model: snax.SNAC,
    codes: list[np.ndarray],
    counts: list[int],
    *,
    lookahead: int | None = None,
    key: jax.Array | None = None,
) -> list[np.ndarray]:
    """The pieces of audio that come out when `counts` coarse frames are passed at a time."""
    decoder, strides = snax.StreamDecoder(model, lookahead=lookahead), model.config.vq_strides
    state, audio = decoder.init_state(len(codes[0]), key=key), []
    for piece in pieces(codes, [math.lcm(*strides) // stride for stride in strides], counts):
        state, new = decoder.step(state, piece)
        audio.append(new)
    return [*audio, decoder.flush(state)]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), samples=st.integers(1, 5000))
def test_streams_are_the_whole(name: str, counts: list[int], samples: int) -> None:
    torch_model, model, speech = pair(name)
    clip = speech[0, 0, 3000 : 3000 + samples]
    expected = torch_encode(torch_model, clip, model.config.pad_multiple)

    encoder = snax.StreamEncoder(model)
    state, streamed = encoder.init_state(), []
    for (piece,) in pieces([clip[None]], [100], [3 * count for count in counts]):
        state, codes = encoder.step(state, piece[:, None])
        streamed.append(codes)
    streamed.append(encoder.flush(state))
    for ours, theirs in zip(zip(*streamed, strict=True), expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(ours, axis=1)[0], theirs)

    audio = np.concatenate(decode(model, [level[None] for level in expected], counts), axis=2)
    np.testing.assert_allclose(audio[0, 0], torch_decode(torch_model, expected), rtol=0, atol=AUDIO_BOUND)


def codes_of(model: snax.SNAC, batch: int = 1, units: int = 30) -> list[np.ndarray]:
    return [np.asarray(x) for x in model.encode(small.audio(batch=batch, samples=units * model.config.pad_multiple))]


def test_noise_is_that_of_the_whole() -> None:
    model = small.model()
    codes = codes_of(model, batch=2)
    keys = jax.random.split(KEY, 2)
    audio = np.concatenate(decode(model, codes, [1, 3], key=keys), axis=2)
    np.testing.assert_allclose(audio, model.decode(codes, key=keys), rtol=0, atol=AUDIO_BOUND)
    assert np.abs(audio - model.decode(codes)).max() > 1e-3


def test_streams_of_a_batch_are_those_alone() -> None:
    model = small.model()
    codes = codes_of(model, batch=3)
    together = np.concatenate(decode(model, codes, [2]), axis=2)
    for i in range(3):
        alone = np.concatenate(decode(model, [level[i : i + 1] for level in codes], [5]), axis=2)
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lookahead", [None, 0, 3])
def test_latency(lookahead: int | None) -> None:
    model = small.model()
    decoder = snax.StreamDecoder(model, lookahead=lookahead)
    codes = codes_of(model)
    *pushed, _ = decode(model, codes, [1], lookahead=lookahead)
    given_out = np.cumsum([audio.shape[2] for audio in pushed])
    received = (1 + np.arange(30)) * small.PAD
    np.testing.assert_array_equal(given_out, np.maximum(0, received - decoder.latency))
    if lookahead is not None:
        assert decoder.latency == lookahead * small.HOP


def test_the_latency_is_not_more_than_what_is_seen() -> None:
    """Another code that far ahead does change a sample; `latency` is that, rounded up by less than a frame a stage."""
    model = small.model()
    codes = codes_of(model)
    changed = [level.copy() for level in codes]
    changed[-1][0, 80] = (changed[-1][0, 80] + 1) % small.CONFIG.codebook_size
    first = np.flatnonzero(np.asarray(model.decode(codes) != model.decode(changed))[0, 0])[0]
    seen = 81 * small.HOP - first
    assert seen - small.HOP <= snax.StreamDecoder(model).latency <= seen + 2 * small.HOP


def test_lookahead_is_nearer_to_the_whole_the_longer_it_is() -> None:
    model = small.model()
    codes = codes_of(model)
    whole = np.asarray(model.decode(codes))
    most = -(-snax.StreamDecoder(model).latency // small.HOP)
    errors = []
    for lookahead in (0, most // 2, most):
        audio = np.concatenate(decode(model, codes, [1], lookahead=lookahead), axis=2)
        assert audio.shape == whole.shape
        errors.append(float(np.sqrt(np.square(audio - whole).mean())))
    assert errors[0] > errors[1] > 1e-4 > AUDIO_BOUND > errors[2]


def test_nothing_compiles_after_the_first_step_and_flush() -> None:
    model = small.drawn("plain convolutions, odd rates")
    codes = codes_of(model)
    with mock.patch.object(streaming, "step_layers", wraps=streaming.step_layers) as traced:
        decode(model, codes, [1])
        compiled = traced.call_count
        decode(model, codes, [3, 1, 8])
    assert traced.call_count == compiled > 0


def test_state_is_a_pytree_and_never_changed() -> None:
    model = small.model()
    decoder, codes = snax.StreamDecoder(model), codes_of(model)
    halves = pieces(codes, [1, 2, 4], [15])
    state, _ = decoder.step(decoder.init_state(), halves[0])
    copied = jax.tree.map(np.array, state)
    _, audio = decoder.step(state, halves[1])
    _, again = decoder.step(copied, halves[1])
    np.testing.assert_array_equal(audio, again)
    jax.tree.map(np.testing.assert_array_equal, state, copied)


def test_a_long_stream_goes_on() -> None:
    """Ten days in, where counting samples would have overflowed 32 bits."""
    model = small.model()
    decoder, codes = snax.StreamDecoder(model), codes_of(model)
    state, _ = decoder.step(decoder.init_state(), codes)
    late = state._replace(frames=10 * 24 * 3600 * small.CONFIG.sampling_rate // small.PAD * 4)
    np.testing.assert_array_equal(decoder.step(late, codes)[1], decoder.step(state, codes)[1])


@pytest.mark.usefixtures("as_users_see_it")
def test_bad_input() -> None:
    model = small.model()
    decoder, codes = snax.StreamDecoder(model), codes_of(model)
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
