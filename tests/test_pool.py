"""Pools of streams: whatever the other streams do, each stream gets what `decode` or `encode` gives for it alone."""

import dataclasses
import random
import threading
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from helpers.pairs import pair
from helpers.streams import AUDIO_BOUND, codes_of, cut, decoding, encoding, run_at_random
from jax.sharding import Mesh

import snax
from snax.inference import steps

# The pair whose attention window spans several coarse frames, and small models.
NAMES = ["attention of two heads, window longer than the strides", *small.CONFIGS]


def model_named(name: str) -> snax.SNAC:
    return small.variant(name) if name in small.CONFIGS else pair(name)[1]


@pytest.mark.parametrize(("slots", "noise"), [(1, False), (3, True), (8, False)])
@pytest.mark.parametrize("name", NAMES)
def test_decoded_streams_equal_decode(name: str, slots: int, noise: bool) -> None:
    model, rng = model_named(name), random.Random(slots)
    pool = snax.StreamPool(model, slots, noise=noise)
    assert run_at_random(pool, 20, rng, decoding(pool, model, rng, noise))["ended"] > 10


@pytest.mark.parametrize("slots", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_encoded_streams_equal_encode(name: str, slots: int) -> None:
    model, rng = model_named(name), random.Random(slots)
    pool = snax.StreamEncoderPool(model, slots)
    assert run_at_random(pool, 15, rng, encoding(pool, model, rng))["ended"] > 8


def decode_alone(pool: snax.StreamPool, codes: list[np.ndarray], blocks: int, **options: Any) -> np.ndarray:
    """Return the audio of one stream that gets one block per step."""
    stream, audio = pool.open(**options), []
    for i in range(blocks):
        stream.feed(cut(codes, i, i + 1, blocks))
        audio += [chunk.output for chunk in pool.step().chunks if chunk.stream is stream]
    stream.end()
    while not (chunk := next(chunk for chunk in pool.step().chunks if chunk.stream is stream)).last:
        audio.append(chunk.output)
    return np.concatenate([*audio, chunk.output])


def test_a_stream_does_not_depend_on_the_others() -> None:
    """To the last bit, with other streams in the pool or none."""
    model = small.model()
    codes = codes_of(model, 9, 0)
    alone = decode_alone(snax.StreamPool(model, 4), codes, 9)
    pool = snax.StreamPool(model, 4)
    for seed in (1, 2):
        pool.open().feed(codes_of(model, 50, seed))
    np.testing.assert_array_equal(decode_alone(pool, codes, 9), alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_reused_slot_equals_a_fresh_one(name: str) -> None:
    """To the last bit, whatever the caches of the slot hold."""
    model = model_named(name)
    codes = codes_of(model, 5, 0)
    fresh = decode_alone(snax.StreamPool(model, 2), codes, 5)
    pool = snax.StreamPool(model, 2)
    decode_alone(pool, codes_of(model, 7, 1), 7)
    for value in (jnp.nan, jnp.inf, 1e30):
        pool._caches = jax.tree.map(lambda cache, value=value: jnp.full_like(cache, value), pool._caches)
        np.testing.assert_array_equal(decode_alone(pool, codes, 5), fresh)

    encoder, audio = snax.StreamEncoderPool(model, 1), small.audio(samples=5 * model.config.pad_multiple)

    def encode() -> list[np.ndarray]:
        stream, outputs = encoder.open(), []
        stream.feed(audio[0, 0])
        stream.end()
        while not outputs or not chunk.last:
            (chunk,) = encoder.step().chunks
            outputs.append(chunk.output)
        return [np.concatenate(level) for level in zip(*outputs, strict=True)]

    expected = encode()
    encoder._caches = jax.tree.map(lambda cache: jnp.full_like(cache, jnp.nan), encoder._caches)
    for actual, level in zip(encode(), expected, strict=True):
        np.testing.assert_array_equal(actual, level)


@pytest.mark.parametrize("lookahead", [0, 3, None])
def test_lookahead_is_that_of_one_stream(lookahead: int | None) -> None:
    model = small.model()
    codes, decoder = codes_of(model, 9, 0), snax.StreamDecoder(model, lookahead=lookahead)
    state, expected = decoder.init_state(), []
    for i in range(9):
        state, audio = decoder.step(state, [level[None] for level in cut(codes, i, i + 1, 9)])
        expected.append(audio[0, 0])
    expected.append(decoder.flush(state)[0, 0])
    pool = snax.StreamPool(model, 3)
    pool.open().feed(codes_of(model, 50, 1))  # exact, in the same pool
    actual = decode_alone(pool, codes, 9, lookahead=lookahead)
    np.testing.assert_allclose(actual, np.concatenate(expected), rtol=0, atol=AUDIO_BOUND)


def test_first_audio_arrives_after_the_latency() -> None:
    model = small.model()
    for lookahead in (None, 0, 3):
        pool = snax.StreamPool(model, 2)
        latency = snax.StreamDecoder(model, lookahead=lookahead).latency
        stream = pool.open(lookahead=lookahead)
        stream.feed(codes_of(model, 9, 0))
        returned = np.cumsum([len(pool.step().chunks[0].output) for _ in range(9)])
        np.testing.assert_array_equal(returned, np.maximum(0, np.arange(1, 10) * small.PAD - latency))


def test_int16() -> None:
    model = small.model()
    codes = codes_of(model, 5, 0)
    audio = decode_alone(snax.StreamPool(model, 2), codes, 5)
    pcm = decode_alone(snax.StreamPool(model, 2, dtype="int16"), codes, 5)
    assert pcm.dtype == np.int16
    # The two programs may round a sample differently.
    np.testing.assert_allclose(pcm, np.clip(audio, -1, 1) * 32767, rtol=0, atol=0.5 + 32767 * 1e-6)


def test_only_the_first_step_compiles() -> None:
    model = small.model(dataclasses.replace(small.CONFIG, decoder_dim=24))  # no other test compiles it
    with mock.patch.object(steps, "step_layers", wraps=steps.step_layers) as traced:
        pool = snax.StreamPool(model, 3, noise=True)
        decode_alone(pool, codes_of(model, 3, 0), 3, key=jax.random.key(0))
        compiled = traced.call_count
        for count in (1, 3, 2):
            streams = [pool.open(key=jax.random.key(i)) for i in range(count)]
            for i, stream in enumerate(streams):
                stream.feed(codes_of(model, 1 + i, i))
                stream.end()
            while pool.free < 3:
                pool.step()
    assert traced.call_count == compiled > 0


def test_slots_on_several_devices() -> None:
    model = small.model()
    mesh = Mesh(np.array(jax.devices()), ("slots",))
    pool = snax.StreamPool(model, 2 * len(jax.devices()), mesh=mesh)
    codes = [codes_of(model, 5, seed) for seed in range(pool.free)]
    streams = [pool.open() for _ in codes]
    for stream, stream_codes in zip(streams, codes, strict=True):
        stream.feed(stream_codes)
        stream.end()
    audio: dict[Any, list[np.ndarray]] = {stream: [] for stream in streams}
    while pool.free < len(streams):
        for stream, output, _ in pool.step().chunks:
            audio[stream].append(output)
    assert len({shard.device for cache in pool._caches for shard in cache.addressable_shards}) == len(jax.devices())
    for stream, stream_codes in zip(streams, codes, strict=True):
        expected = model.decode([level[None] for level in stream_codes])[0, 0]
        np.testing.assert_allclose(np.concatenate(audio[stream]), expected, rtol=0, atol=AUDIO_BOUND)
    with pytest.raises(ValueError, match=r"`slots` \(=3\) must be a positive multiple of the number of devices, 4"):
        snax.StreamPool(model, 3, mesh=mesh)


def test_streams_of_other_threads() -> None:
    """Threads open, feed and end streams while one thread steps."""
    model, results = small.model(), dict[int, np.ndarray]()
    pool, audio, owners = snax.StreamPool(model, 4), dict[Any, list[np.ndarray]](), dict[Any, threading.Event]()

    def call(number: int) -> None:
        for turn in range(5):
            codes = codes_of(model, 6, 10 * number + turn)
            stream = pool.open()
            audio[stream], owners[stream] = [], threading.Event()
            for i in range(6):
                stream.feed(cut(codes, i, i + 1, 6))
            stream.end()
            assert owners[stream].wait(60)
            results[10 * number + turn] = np.concatenate(audio[stream])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for stream, output, last in pool.step().chunks:
            audio[stream].append(output)
            if last:
                owners[stream].set()
    assert len(results) == 20
    for seed, actual in results.items():
        expected = model.decode([level[None] for level in codes_of(model, 6, seed)])[0, 0]
        np.testing.assert_allclose(actual, expected, rtol=0, atol=AUDIO_BOUND)


def test_a_slot_that_is_reused_during_a_step() -> None:
    """The stream before gets nothing more, and the stream after gets only its own audio."""
    model = small.model()
    pool, codes = snax.StreamPool(model, 1), codes_of(model, 5, 1)
    expected = decode_alone(pool, codes, 5)
    first = pool.open()
    first.feed(codes_of(model, 50, 0))
    for _ in range(10):
        pool.step()
    second, run = None, pool._run

    def reopen(block: Any) -> Any:
        nonlocal second
        first.abort()
        second = pool.open()
        second.feed(codes)
        second.end()
        return run(block)

    with mock.patch.object(pool, "_run", reopen):
        assert pool.step().chunks == []
    audio = []
    while not pool.free:
        (chunk,) = pool.step().chunks
        assert chunk.stream is second
        audio.append(chunk.output)
    np.testing.assert_array_equal(np.concatenate(audio), expected)


def test_steps_are_fair_and_tell_what_they_did() -> None:
    """A stream with much to do does not slow down one with little."""
    model = small.model()
    pool = snax.StreamPool(model, 3)
    assert pool.step().chunks == []
    busy, idle, late = pool.open(), pool.open(), pool.open()
    busy.feed(codes_of(model, 50, 0))
    for left in (49, 48, 47):
        late.feed(codes_of(model, 1, 0))
        step = pool.step()
        assert step.active == 2
        assert step.seconds > 0
        assert [chunk.stream for chunk in step.chunks] == [busy, late]
        assert (busy.pending, late.pending, idle.pending) == (left, 0, 0)


@pytest.mark.usefixtures("as_users_see_it")
def test_errors() -> None:
    model = small.model()
    pool = snax.StreamPool(model, 1)
    stream = pool.open()
    with pytest.raises(snax.PoolFullError, match="All 1 slots are in use"):
        pool.open()
    with pytest.raises(ValueError, match=r"`codes\[2\]` must be between 0 and `codebook_size` - 1"):
        stream.feed([np.zeros(1, np.int32), np.zeros(2, np.int32), np.full(4, 64, np.int32)])
    with pytest.raises(ValueError, match="must cover the same clips and time at every level"):
        stream.feed([np.zeros(1, np.int32)] * 3)
    stream.feed([np.zeros(0, np.int32)] * 3)  # as a parser returns while no group is complete
    stream.end()
    for call in (stream.end, lambda: stream.feed(codes_of(model, 1, 0))):
        with pytest.raises(ValueError, match="The stream has ended"):
            call()
    assert pool.step().chunks[0].last
    with pytest.raises(ValueError, match="must not be given, because the pool has no noise"):
        pool.open(key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"`lookahead` \(=99\) must be between 0 and"):
        pool.open(lookahead=99)
    noisy = snax.StreamPool(model, 1, noise=True)
    with pytest.raises(ValueError, match="`key` must be given"):
        noisy.open()
    with pytest.raises(ValueError, match="one key of JAX's default implementation"):
        noisy.open(key=jax.random.split(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"`slots` \(=0\) must be a positive multiple"):
        snax.StreamEncoderPool(model, 0)
    windowed = snax.StreamPool(pair(NAMES[0])[1], 1).open()
    windowed.feed([np.zeros(n, np.int32) for n in (2, 4, 8)])
    with pytest.raises(ValueError, match="ends 8 latent frames into an attention window of 12"):
        windowed.end()
    windowed.feed([np.zeros(n, np.int32) for n in (1, 2, 4)])
    windowed.end()
