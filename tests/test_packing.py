"""Clips of any length in rows of any shape: the reference's tokens and audio for each clip alone."""

from collections import deque
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from helpers.pairs import pair, torch_decode
from helpers.reference import assert_same_codes
from hypothesis import given, settings
from hypothesis import strategies as st

import snax
from snax.codec.model import Decoder, Encoder
from snax.inference import packing
from snax.inference.packing import _Layout

KEY = jax.random.key(3)
# float32's rounding in the largest model, whose audio differs by up to 1.1e-6 from the reference's; seen here: 1e-6.
AUDIO_BOUND = 1e-5

NAMES = [
    "depthwise, noise",
    "attention of two heads, window longer than the strides",
    "odd rates, dense",
    pytest.param("dense", marks=pytest.mark.slow),
    pytest.param("decoder with other rates", marks=pytest.mark.slow),
    pytest.param("strides that share no factor", marks=pytest.mark.slow),
]


def row_seconds(model: snax.SNAC, blocks: int) -> float:
    """Length of rows of `blocks` and one gap between the contexts."""
    layout = _Layout.create(model, None, None, None)
    return (2 * layout.context + layout.gap + blocks) * model.config.pad_multiple / model.config.sampling_rate


def cut(audio: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Clips of these lengths from all over `audio`, (samples,)."""
    return [audio[(1009 * i) % (len(audio) - n) :][:n] for i, n in enumerate(lengths)]


# Three row shapes, so that few have to be compiled: one block at a time, several rows of a few, one row for all.
ROWS = st.sampled_from([(1, 1), (3, 7), (1, 200)])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_clips_in_any_rows(name: str, data: st.DataObject) -> None:
    torch_model, model, speech = pair(name)
    lengths = data.draw(st.lists(st.integers(1, 30 * model.config.pad_multiple), min_size=1, max_size=8))
    rows, blocks = data.draw(ROWS)
    how = {"rows": rows, "row_seconds": row_seconds(model, blocks)}
    clips = cut(np.tile(speech[0, 0], 10), lengths)
    encoded = list(snax.encode_many(model, clips, **how))
    assert [clip.samples for clip in encoded] == lengths
    decoded = list(snax.decode_many(model, encoded, **how))
    assert len(decoded) == len(clips)
    for clip, (codes, _), audio in zip(clips, encoded, decoded, strict=True):
        assert_same_codes(torch_model, np.pad(clip, (0, -len(clip) % model.config.pad_multiple)), codes)
        whole = torch_decode(torch_model, codes)
        np.testing.assert_allclose(audio, whole[: len(clip)], rtol=0, atol=AUDIO_BOUND)


def test_one_compilation_serves_all_long_inputs() -> None:
    model = small.drawn("plain convolutions, odd rates")
    row = _Layout.create(model, None, None, None).batch_stride * model.config.pad_multiple
    with (
        mock.patch.object(Encoder, "__call__", autospec=True, side_effect=Encoder.__call__) as encoder,
        mock.patch.object(Decoder, "__call__", autospec=True, side_effect=Decoder.__call__) as decoder,
    ):
        for lengths in ([1, row, 77], [3 * row], [row // 20] * 30):
            encoded = snax.encode_many(model, cut(small.audio(samples=4 * row)[0, 0], lengths))
            assert [len(audio) for audio in snax.decode_many(model, encoded)] == lengths
    assert (encoder.call_count, decoder.call_count) == (1, 1)  # traced once each


def test_short_inputs_compute_short_rows() -> None:
    """At most an eighth more than the clips and the gaps between them, in lengths of four significant bits."""
    layout, computed = _Layout.create(small.model(), None, None, None), set[int]()
    for count in range(1, layout.batch_stride + 2):
        fitted, clips = layout.fit([([np.zeros(count, np.int8)], None)], 1)
        assert len(list(clips)) == 1
        assert fitted.row_length == layout.row_length or count <= fitted.row_stride <= 9 / 8 * count
        computed.add(fitted.row_length)
    assert layout.row_length in computed
    assert len(computed) <= 8 * layout.row_length.bit_length()
    two, _ = layout.fit([([np.zeros(5, np.int8)], None)] * 2, 1)
    assert two.row_length == 10 + layout.gap
    for fixed in (_Layout.create(small.model(), 9.0, None, None), _Layout.create(small.model(), None, 1, None)):
        assert fixed.fit([], 1)[0] is fixed


@pytest.mark.parametrize("name", ["depthwise, noise", "attention of two heads, window longer than the strides"])
def test_clips_in_a_short_row(name: str) -> None:
    torch_model, model, speech = pair(name)
    clips = cut(speech[0, 0], [3 * model.config.pad_multiple - 1, 1, 777])
    encoded = list(snax.encode_many(model, clips))
    for clip, (codes, _), audio in zip(clips, encoded, snax.decode_many(model, encoded), strict=True):
        assert_same_codes(torch_model, np.pad(clip, (0, -len(clip) % model.config.pad_multiple)), codes)
        whole = torch_decode(torch_model, codes)
        np.testing.assert_allclose(audio, whole[: len(clip)], rtol=0, atol=AUDIO_BOUND)


def test_results_come_while_clips_still_arrive() -> None:
    model, read = small.model(), 0

    def clips() -> Iterator[np.ndarray]:
        nonlocal read
        for clip in cut(small.audio(samples=100_000)[0, 0], [1000] * 50):
            read += 1
            yield clip

    encoded = snax.encode_many(model, clips(), row_seconds=row_seconds(small.model(), 40))
    next(encoded)
    # A block is 32 samples: the clip lies in the first row, and one more is laid while that is computed.
    assert read <= 3
    assert len(list(encoded)) == 49


def test_no_clips() -> None:
    assert list(snax.encode_many(small.model(), [])) == []
    assert list(snax.decode_many(small.model(), [])) == []


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_rows_over_a_mesh(axis_type: jax.sharding.AxisType) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    model = small.model()
    clips = cut(small.audio(samples=20_000)[0, 0], [3000, 1, 7000])
    how = {"row_seconds": row_seconds(small.model(), 20)}
    encoded = list(snax.encode_many(model, clips, mesh=mesh, **how))
    jax.tree.map(np.testing.assert_array_equal, encoded, list(snax.encode_many(model, clips, **how)))
    ours = snax.decode_many(model, encoded, mesh=mesh, key=KEY, **how)
    for audio, alone in zip(ours, snax.decode_many(model, encoded, key=KEY, **how), strict=True):
        np.testing.assert_allclose(audio, alone, rtol=0, atol=1e-6)


def test_codes_alone_are_decoded_whole() -> None:
    model = small.model()
    ((codes, _),) = snax.encode_many(model, [small.audio(samples=100)[0, 0]])
    (audio,) = snax.decode_many(model, [codes])
    assert len(audio) == 128
    np.testing.assert_allclose(audio, model.decode([x[None] for x in codes])[0, 0], rtol=0, atol=1e-6)


def test_noise_is_that_of_the_clip_alone() -> None:
    model = small.model()
    encoded = list(snax.encode_many(model, cut(small.audio(samples=20_000)[0, 0], [3000, 5000, 200])))
    decoded = snax.decode_many(model, encoded, key=KEY, row_seconds=row_seconds(small.model(), 10), rows=2)
    for (codes, samples), audio in zip(encoded, decoded, strict=True):
        alone = model.decode([level[None] for level in codes], key=KEY)[0, 0, :samples]
        silent = model.decode([level[None] for level in codes])[0, 0, :samples]
        np.testing.assert_allclose(audio, alone, rtol=0, atol=1e-5)
        assert np.abs(audio - silent).max() > 1e-3


@pytest.mark.parametrize("name", ["depthwise", "attention"])
def test_valid_in_a_batch_of_two_lengths(name: str) -> None:
    model = small.drawn(name)
    short, long = (small.audio(samples=n * model.config.pad_multiple, seed=n) for n in (3, 20))
    padded = np.concatenate([np.pad(short, ((0, 0), (0, 0), (0, long.shape[-1] - short.shape[-1]))), long])
    frames = [audio.shape[-1] // model.config.hop_length for audio in (short, long)]
    padding_mask = np.arange(frames[1]) < np.array(frames)[:, None]
    codes = model.encode(padded, padding_mask=padding_mask)
    assert any((a != b).any() for a, b in zip(codes, model.encode(padded), strict=True)), "padding changes nothing here"
    decoded = model.decode(codes, padding_mask=padding_mask)
    for i, alone in enumerate((short, long)):
        expected = model.encode(alone)
        for ours, level in zip(codes, expected, strict=True):
            np.testing.assert_array_equal(ours[i, : level.shape[1]], level[0])
        np.testing.assert_allclose(decoded[i, :, : alone.shape[-1]], model.decode(expected)[0], rtol=0, atol=1e-6)


def test_a_smaller_gap_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clips = small.drawn("depthwise"), cut(small.audio(samples=20_000)[0, 0], [3200, 3200])
    exact = [jnp.concatenate(clip.codes) for clip in snax.encode_many(model, clips)]
    create = _Layout.create

    def without_gap(*args: object) -> _Layout:
        return packing.dataclasses.replace(create(*args), gap=0)

    monkeypatch.setattr(_Layout, "create", without_gap)
    touching = [jnp.concatenate(clip.codes) for clip in snax.encode_many(model, clips)]
    assert any((a != b).any() for a, b in zip(exact, touching, strict=True))


CLIP = small.audio()[0, 0]
BAD_CLIPS = {
    "batch axes": (CLIP[None, None], r"`clips\[1\]` must be mono audio.*\(samples,\), got \(1, 1, 320\)"),
    "empty": (CLIP[:0], r"`clips\[1\]` must be .* at least one sample"),
    "integers": (np.zeros(5, np.int16), r"`clips\[1\]` must be floating point, got int16. .*`clip / 32768`"),
    "NaN": (np.where(CLIP > 0.5, np.nan, CLIP), r"`clips\[1\]` must be finite"),
    "a list": ([0.0], r"`clips\[1\]` must be a JAX or NumPy array"),
}


@pytest.mark.parametrize("name", BAD_CLIPS)
@pytest.mark.usefixtures("as_users_see_it")
def test_bad_clips(name: str) -> None:
    clip, message = BAD_CLIPS[name]
    with pytest.raises(ValueError, match=message):
        list(snax.encode_many(small.model(), [CLIP, clip]))


CODES = [np.zeros(2, np.int32), np.zeros(4, np.int32), np.zeros(8, np.int32)]
BAD_CODES = {
    "a level short": (CODES[:2], r"`clips\[0\]` cannot be decoded: `codes` must be .* 3 arrays"),
    "a batch": ([level[None] for level in CODES], r"`clips\[0\]` must be one array \(frames,\) for each level"),
    "not in the codebook": ([*CODES[:2], CODES[2] + 64], r"`clips\[0\]` cannot be decoded: `codes\[2\]` must be"),
    "more samples than codes": (
        snax.EncodedClip(tuple(CODES), 65),
        r"`samples` of `clips\[0\]` \(=65\) must be between 1 and 64",
    ),
}


@pytest.mark.parametrize("name", BAD_CODES)
@pytest.mark.usefixtures("as_users_see_it")
def test_bad_codes(name: str) -> None:
    codes, message = BAD_CODES[name]
    with pytest.raises(ValueError, match=message):
        list(snax.decode_many(small.model(), [codes]))


@pytest.mark.usefixtures("as_users_see_it")
def test_bad_rows() -> None:
    with pytest.raises(ValueError, match=r"`row_seconds` \(=0.01\) must be at least"):
        list(snax.encode_many(small.model(), [CLIP], row_seconds=0.01))
    mesh = jax.make_mesh((4,), ("data",))
    with pytest.raises(ValueError, match=r"`rows` \(=6\) must be a positive multiple of the number of devices, 4"):
        list(snax.encode_many(small.model(), [CLIP], rows=6, mesh=mesh))


@pytest.mark.usefixtures("as_users_see_it")
def test_an_incomplete_attention_window() -> None:
    model = pair("attention of two heads, window longer than the strides")[1]
    with pytest.raises(ValueError, match="has 8 latent frames, which must be a multiple of the attention window, 12"):
        list(snax.decode_many(model, [CODES]))


@pytest.mark.usefixtures("as_users_see_it")
def test_a_rate_of_one_cannot_be_cut() -> None:
    model = pair("rate of one")[1]
    with pytest.raises(ValueError, match="has a rate of 1, whose convolution adds a frame"):
        list(snax.encode_many(model, [CLIP]))


def test_computed_blocks() -> None:
    """Counted without computing anything, as many as are computed."""
    model = small.model()
    layout = _Layout.create(model, None, None, None)
    for counts in (
        [],
        [1],
        [layout.batch_stride],
        [layout.batch_stride - layout.gap, 1],
        [layout.batch_stride, 1],
        [3, 5000, 7] * 9,
    ):
        clips = (([np.zeros(count, np.int8)], None) for count in counts)
        batches = packing._batches(clips, [1], np.int8, layout, deque())
        assert packing.computed_blocks(model, counts) == sum(batch[0].size for batch in batches)
