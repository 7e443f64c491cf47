"""Packing equals the reference on each clip alone, for clips of any length and rows of any shape."""

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
# For float32 rounding. Largest difference: 1e-6 here, 1.1e-6 from the reference in the largest model.
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
    """Return the length of rows with `blocks` and one gap between the contexts."""
    layout = _Layout.create(model, None, None, None)
    return (2 * layout.context + layout.gap + blocks) * model.config.pad_multiple / model.config.sampling_rate


def cut_clips(audio: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    """Cut clips of these lengths from different places of `audio`, (samples,)."""
    return [audio[(1009 * i) % (len(audio) - n) :][:n] for i, n in enumerate(lengths)]


# Rows and blocks per row: one block, several rows of a few blocks, one row for all clips. Each shape is compiled.
ROWS = st.sampled_from([(1, 1), (3, 7), (1, 200)])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_matches_reference_for_any_lengths_and_rows(name: str, data: st.DataObject) -> None:
    torch_model, model, speech = pair(name)
    lengths = data.draw(st.lists(st.integers(1, 30 * model.config.pad_multiple), min_size=1, max_size=8))
    rows, blocks = data.draw(ROWS)
    layout = {"rows": rows, "row_seconds": row_seconds(model, blocks)}
    clips = cut_clips(np.tile(speech[0, 0], 10), lengths)
    encoded = list(snax.encode_many(model, clips, **layout))
    assert [clip.samples for clip in encoded] == lengths
    decoded = list(snax.decode_many(model, encoded, **layout))
    assert len(decoded) == len(clips)
    for clip, (codes, _), audio in zip(clips, encoded, decoded, strict=True):
        assert_same_codes(torch_model, np.pad(clip, (0, -len(clip) % model.config.pad_multiple)), codes)
        expected = torch_decode(torch_model, codes)
        np.testing.assert_allclose(audio, expected[: len(clip)], rtol=0, atol=AUDIO_BOUND)


def test_compiles_once_for_all_lengths() -> None:
    model = small.variant("plain convolutions, odd rates")
    row = _Layout.create(model, None, None, None).batch_stride * model.config.pad_multiple
    with (
        mock.patch.object(Encoder, "__call__", autospec=True, side_effect=Encoder.__call__) as encoder,
        mock.patch.object(Decoder, "__call__", autospec=True, side_effect=Decoder.__call__) as decoder,
    ):
        for lengths in ([1, row, 77], [3 * row], [row // 20] * 30):
            encoded = snax.encode_many(model, cut_clips(small.audio(samples=4 * row)[0, 0], lengths))
            assert [len(audio) for audio in snax.decode_many(model, encoded)] == lengths
    assert (encoder.call_count, decoder.call_count) == (1, 1)  # traced once each


def test_shortens_row_for_short_clips() -> None:
    """The row is at most an eighth longer than the clips and gaps, and its length has four significant bits."""
    layout, row_lengths = _Layout.create(small.model(), None, None, None), set[int]()
    for count in range(1, layout.batch_stride + 2):
        fitted, clips = layout.fit([([np.zeros(count, np.int8)], None)], 1)
        assert len(list(clips)) == 1
        assert fitted.row_length == layout.row_length or count <= fitted.row_stride <= 9 / 8 * count
        row_lengths.add(fitted.row_length)
    assert layout.row_length in row_lengths
    assert len(row_lengths) <= 8 * layout.row_length.bit_length()
    two, _ = layout.fit([([np.zeros(5, np.int8)], None)] * 2, 1)
    assert two.row_length == 10 + layout.gap
    for fixed in (_Layout.create(small.model(), 9.0, None, None), _Layout.create(small.model(), None, 1, None)):
        assert fixed.fit([], 1)[0] is fixed


@pytest.mark.parametrize("name", ["depthwise, noise", "attention of two heads, window longer than the strides"])
def test_short_row_matches_reference(name: str) -> None:
    torch_model, model, speech = pair(name)
    clips = cut_clips(speech[0, 0], [3 * model.config.pad_multiple - 1, 1, 777])
    encoded = list(snax.encode_many(model, clips))
    for clip, (codes, _), audio in zip(clips, encoded, snax.decode_many(model, encoded), strict=True):
        assert_same_codes(torch_model, np.pad(clip, (0, -len(clip) % model.config.pad_multiple)), codes)
        expected = torch_decode(torch_model, codes)
        np.testing.assert_allclose(audio, expected[: len(clip)], rtol=0, atol=AUDIO_BOUND)


def test_yields_results_before_all_clips_are_read() -> None:
    model, num_read = small.model(), 0

    def clips() -> Iterator[np.ndarray]:
        nonlocal num_read
        for clip in cut_clips(small.audio(samples=100_000)[0, 0], [1000] * 50):
            num_read += 1
            yield clip

    encoded = snax.encode_many(model, clips(), row_seconds=row_seconds(small.model(), 40))
    next(encoded)
    # A block is 32 samples: the clip lies in the first row, and the next row is packed while that is computed.
    assert num_read <= 3
    assert len(list(encoded)) == 49


def test_no_clips() -> None:
    assert list(snax.encode_many(small.model(), [])) == []
    assert list(snax.decode_many(small.model(), [])) == []


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_divides_rows_over_a_mesh(axis_type: jax.sharding.AxisType) -> None:
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    model = small.model()
    clips = cut_clips(small.audio(samples=20_000)[0, 0], [3000, 1, 7000])
    layout = {"row_seconds": row_seconds(small.model(), 20)}
    encoded = list(snax.encode_many(model, clips, mesh=mesh, **layout))
    jax.tree.map(np.testing.assert_array_equal, encoded, list(snax.encode_many(model, clips, **layout)))
    sharded = snax.decode_many(model, encoded, mesh=mesh, key=KEY, **layout)
    for audio, expected in zip(sharded, snax.decode_many(model, encoded, key=KEY, **layout), strict=True):
        np.testing.assert_allclose(audio, expected, rtol=0, atol=1e-6)


def test_codes_without_length_are_not_trimmed() -> None:
    model = small.model()
    ((codes, _),) = snax.encode_many(model, [small.audio(samples=100)[0, 0]])
    (audio,) = snax.decode_many(model, [codes])
    assert len(audio) == 128
    np.testing.assert_allclose(audio, model.decode([x[None] for x in codes])[0, 0], rtol=0, atol=1e-6)


def test_noise_equals_that_of_each_clip_alone() -> None:
    model = small.model()
    encoded = list(snax.encode_many(model, cut_clips(small.audio(samples=20_000)[0, 0], [3000, 5000, 200])))
    decoded = snax.decode_many(model, encoded, key=KEY, row_seconds=row_seconds(small.model(), 10), rows=2)
    for (codes, samples), audio in zip(encoded, decoded, strict=True):
        alone = model.decode([level[None] for level in codes], key=KEY)[0, 0, :samples]
        silent = model.decode([level[None] for level in codes])[0, 0, :samples]
        np.testing.assert_allclose(audio, alone, rtol=0, atol=1e-5)
        assert np.abs(audio - silent).max() > 1e-3


@pytest.mark.parametrize("name", ["depthwise", "attention"])
def test_padding_mask_for_two_lengths(name: str) -> None:
    model = small.variant(name)
    short, long = (small.audio(samples=n * model.config.pad_multiple, seed=n) for n in (3, 20))
    padded = np.concatenate([np.pad(short, ((0, 0), (0, 0), (0, long.shape[-1] - short.shape[-1]))), long])
    frames = [audio.shape[-1] // model.config.hop_length for audio in (short, long)]
    padding_mask = np.arange(frames[1]) < np.array(frames)[:, None]
    codes = model.encode(padded, padding_mask=padding_mask)
    assert any((a != b).any() for a, b in zip(codes, model.encode(padded), strict=True)), "the mask has no effect"
    decoded = model.decode(codes, padding_mask=padding_mask)
    for i, clip in enumerate((short, long)):
        expected = model.encode(clip)
        for level, expected_level in zip(codes, expected, strict=True):
            np.testing.assert_array_equal(level[i, : expected_level.shape[1]], expected_level[0])
        np.testing.assert_allclose(decoded[i, :, : clip.shape[-1]], model.decode(expected)[0], rtol=0, atol=1e-6)


def test_without_gap_codes_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clips = small.variant("depthwise"), cut_clips(small.audio(samples=20_000)[0, 0], [3200, 3200])
    with_gap = [jnp.concatenate(clip.codes) for clip in snax.encode_many(model, clips)]
    create = _Layout.create

    def without_gap(*args: object) -> _Layout:
        return packing.dataclasses.replace(create(*args), gap=0)

    monkeypatch.setattr(_Layout, "create", without_gap)
    adjacent = [jnp.concatenate(clip.codes) for clip in snax.encode_many(model, clips)]
    assert any((a != b).any() for a, b in zip(with_gap, adjacent, strict=True))


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
def test_rejects_invalid_clips(name: str) -> None:
    clip, message = BAD_CLIPS[name]
    with pytest.raises(ValueError, match=message):
        list(snax.encode_many(small.model(), [CLIP, clip]))


CODES = [np.zeros(2, np.int32), np.zeros(4, np.int32), np.zeros(8, np.int32)]
BAD_CODES = {
    "missing level": (CODES[:2], r"`clips\[0\]` cannot be decoded: `codes` must be .* 3 arrays"),
    "batch axis": ([level[None] for level in CODES], r"`clips\[0\]` must be one array \(frames,\) for each level"),
    "not in the codebook": ([*CODES[:2], CODES[2] + 64], r"`clips\[0\]` cannot be decoded: `codes\[2\]` must be"),
    "more samples than codes": (
        snax.EncodedClip(tuple(CODES), 65),
        r"`samples` of `clips\[0\]` \(=65\) must be between 1 and 64",
    ),
}


@pytest.mark.parametrize("name", BAD_CODES)
@pytest.mark.usefixtures("as_users_see_it")
def test_rejects_invalid_codes(name: str) -> None:
    codes, message = BAD_CODES[name]
    with pytest.raises(ValueError, match=message):
        list(snax.decode_many(small.model(), [codes]))


@pytest.mark.usefixtures("as_users_see_it")
def test_rejects_invalid_rows() -> None:
    with pytest.raises(ValueError, match=r"`row_seconds` \(=0.01\) must be at least"):
        list(snax.encode_many(small.model(), [CLIP], row_seconds=0.01))
    mesh = jax.make_mesh((4,), ("data",))
    with pytest.raises(ValueError, match=r"`rows` \(=6\) must be a positive multiple of the number of devices, 4"):
        list(snax.encode_many(small.model(), [CLIP], rows=6, mesh=mesh))


@pytest.mark.usefixtures("as_users_see_it")
def test_rejects_incomplete_attention_window() -> None:
    model = pair("attention of two heads, window longer than the strides")[1]
    with pytest.raises(ValueError, match="has 8 latent frames, which must be a multiple of the attention window, 12"):
        list(snax.decode_many(model, [CODES]))


@pytest.mark.usefixtures("as_users_see_it")
def test_rejects_rate_of_one() -> None:
    model = pair("rate of one")[1]
    with pytest.raises(ValueError, match="has a rate of 1, whose convolution adds a frame"):
        list(snax.encode_many(model, [CLIP]))


def test_computed_blocks() -> None:
    """The count, without any computation, equals the blocks of the batches."""
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
