"""Token layouts, compared with the orders and ids in the code of the language models."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snax import tokens
from snax.tokens import MINI_OMNI, ORPHEUS, ORPHEUS_NUMBERS, TokenLayout


def codes(vq_strides: tuple[int, ...], groups: int, batch: int = 1, seed: int = 0) -> list[np.ndarray]:
    rng, frames = np.random.default_rng(seed), np.lcm.reduce(vq_strides) * groups
    return [rng.integers(0, 4096, (batch, frames // stride), np.int32) for stride in vq_strides]


def assert_equal(actual: object, expected: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, list(actual), list(expected))


def test_order_of_three_levels() -> None:
    coarse, middle, fine = [np.array([[100, 101]])], [np.array([[200, 201, 202, 203]])], [np.arange(300, 308)[None]]
    flat = TokenLayout((4, 2, 1)).flatten([*coarse, *middle, *fine])
    assert flat.tolist() == [[100, 200, 300, 301, 201, 302, 303, 101, 202, 304, 305, 203, 306, 307]]


def test_order_of_four_levels() -> None:
    names = ["A1", "B1 B2", "C1 C2 C3 C4", "D1 D2 D3 D4 D5 D6 D7 D8"]
    flat = [names[level].split()[i] for level, i in TokenLayout((8, 4, 2, 1)).slots]
    assert " ".join(flat) == "A1 B1 C1 D1 D2 C2 D3 D4 B2 C3 D5 D6 C4 D7 D8"


def test_orpheus() -> None:
    zeros = [np.zeros((1, n), np.int32) for n in (1, 2, 4)]
    first = [128266 + 4096 * slot for slot in range(7)]
    assert ORPHEUS.flatten(zeros).tolist() == [first]
    assert ORPHEUS_NUMBERS.flatten(zeros).tolist() == [[10 + 4096 * slot for slot in range(7)]]
    assert_equal(ORPHEUS.unflatten(np.array([first])), zeros)  # code 0 is valid


def test_mini_omni() -> None:
    groups = 3
    streams = np.asarray(tokens.mini_omni_streams(codes((4, 2, 1), groups)))
    local = streams[0] - (152000 + 4160 * np.arange(7))[:, None]
    slots = np.asarray(TokenLayout((4, 2, 1)).flatten(codes((4, 2, 1), groups))).reshape(groups, 7).T
    for i in range(7):
        assert local[i].tolist() == [4097] * (i + 1) + slots[i].tolist() + [4096] + [4097] * (6 - i)
    assert_equal(tokens.mini_omni_codes(streams), codes((4, 2, 1), groups))


STRIDES = st.lists(st.integers(1, 8), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)
@given(strides=STRIDES, groups=st.integers(0, 5), batch=st.integers(1, 3), step=st.sampled_from([0, 4096, 5000]))
def test_unflatten_inverts_flatten(strides: tuple[int, ...], groups: int, batch: int, step: int) -> None:
    layout = TokenLayout(strides, first_id=7, slot_step=step)
    given_codes = codes(strides, groups, batch)
    flat = layout.flatten(given_codes)
    assert flat.shape == (batch, groups * len(layout.slots))
    assert_equal(layout.unflatten(flat), given_codes)


def test_jit() -> None:
    layout, given_codes = TokenLayout((8, 4, 2, 1), slot_step=4096), codes((8, 4, 2, 1), 3, batch=2)
    flat = jax.jit(layout.flatten)(given_codes)
    assert_equal([flat], [layout.flatten(given_codes)])
    assert_equal(jax.jit(layout.unflatten)(flat), given_codes)
    streams = jax.jit(tokens.mini_omni_streams)(given_codes[1:])
    assert_equal(jax.jit(tokens.mini_omni_codes)(streams), given_codes[1:])


def test_incomplete_group() -> None:
    flat = np.asarray(ORPHEUS.flatten(codes((4, 2, 1), 2)))
    groups, remainder = ORPHEUS.split(flat[:, :-3])
    assert_equal([groups, remainder], [flat[:, :7], flat[:, 7:11]])
    with pytest.raises(
        ValueError,
        match=r"tokens \(=11\) must be a multiple of 7, .* Remove the 4 tokens of the incomplete group with `split`",
    ):
        ORPHEUS.unflatten(flat[:, :-3])


@pytest.mark.usefixtures("as_users_see_it")
def test_errors() -> None:
    flat = np.array(ORPHEUS.flatten(codes((4, 2, 1), 3)))
    with pytest.raises(
        ValueError, match=r"`tokens\[0, 0\]` .* must be a code of slot 0, .* but is one of slot 1\. A token"
    ):
        ORPHEUS.unflatten(flat[:, 1:8])
    special = flat.copy()
    special[0, 9] = tokens.ORPHEUS_END
    with pytest.raises(
        ValueError, match=r"`tokens\[0, 9\]` \(=128258\) must be a code of slot 2, .*\. Remove text and"
    ):
        ORPHEUS.unflatten(special)
    with pytest.raises(ValueError, match=r"`tokens\[0, 0\]` \(=4096\) must be a code of slot 0, 0 to 4095\."):
        TokenLayout((1,)).unflatten(np.array([[4096]]))
    with pytest.raises(ValueError, match=r"`tokens` must be \(batch, tokens\), got \(21,\)"):
        ORPHEUS.unflatten(flat[0])
    with pytest.raises(ValueError, match=r"a multiple of \[1, 2, 4\] codes, got shapes \[\(1, 3\), \(1, 6\)\]"):
        ORPHEUS.flatten(codes((4, 2, 1), 3)[:2])
    with pytest.raises(ValueError, match=r"`slot_step` \(=100\) must be 0 or at least 4096"):
        TokenLayout((4, 2, 1), slot_step=100)
    with pytest.raises(ValueError, match=r"`streams` must be \(batch, 7, groups \+ 8\), got \(1, 8, 10\)"):
        tokens.mini_omni_codes(np.zeros((1, 8, 10), np.int32))
    streams = np.array(tokens.mini_omni_streams(codes((4, 2, 1), 2)))
    streams[0, 3, 4] = MINI_OMNI.first_id + 3 * 4160 + tokens.MINI_OMNI_PAD
    with pytest.raises(ValueError, match="must be a code of slot 3"):
        tokens.mini_omni_codes(streams)


def parsed(parser: object, method: str, pieces: list[object]) -> list[np.ndarray]:
    """Return the codes that a parser returns for all pieces together, (1, frames / stride) per level."""
    return [np.concatenate(level)[None] for level in zip(*map(getattr(parser, method), pieces), strict=True)]


def cut(sequence: object, places: list[int]) -> list[object]:
    """Cut a sequence at these places."""
    bounds = [0, *sorted(place % (len(sequence) + 1) for place in places), len(sequence)]
    return [sequence[low:high] for low, high in itertools.pairwise(bounds)]


PLACES = st.lists(st.integers(0, 10_000), max_size=40)


@settings(deadline=None)
@given(strides=STRIDES, groups=st.integers(0, 5), step=st.sampled_from([0, 4096, 5000]), places=PLACES)
def test_parser_takes_ids_in_any_pieces(strides: tuple[int, ...], groups: int, step: int, places: list[int]) -> None:
    layout = TokenLayout(strides, first_id=7, slot_step=step)
    expected = codes(strides, groups)
    parser = tokens.TokenParser(layout, "raise")
    assert_equal(parsed(parser, "feed", cut(layout.flatten(expected)[0], places)), expected)
    assert parser.dropped == 0


@settings(deadline=None)
@given(
    groups=st.integers(1, 5),
    places=PLACES,
    between=st.lists(st.text("<custom_token_0123> é", max_size=5).filter(lambda text: ">" not in text), min_size=1),
)
def test_parser_takes_text_cut_anywhere(groups: int, places: list[int], between: list[str]) -> None:
    expected = codes((4, 2, 1), groups)
    numbers = ORPHEUS_NUMBERS.flatten(expected)[0]
    text = "<custom_token_1>" + "".join(
        f"{other}<custom_token_{number}>" for number, other in zip(numbers, itertools.cycle(between), strict=False)
    )
    parser = tokens.TokenParser(ORPHEUS_NUMBERS, "raise")
    assert_equal(parsed(parser, "feed_text", cut(text, places)), expected)


def test_parser_bounds_the_text_it_keeps() -> None:
    parser = tokens.TokenParser(ORPHEUS_NUMBERS)
    for piece in ("<custom_token_", "1" * 100, "a" * 100_000, "<" * 100_000):
        parser.feed_text(piece)
        assert len(parser._text) < 30


def group_ids(value: int) -> list[int]:
    """Return the Orpheus tokens of a group in which all codes are `value`."""
    return [128266 + 4096 * slot + value for slot in range(7)]


FIRST, SECOND, THIRD = group_ids(0), group_ids(4095), group_ids(7)
PAST_THE_END = 128266 + 7 * 4096  # code 4096 of the last slot


@pytest.mark.parametrize(
    ("ids", "on_error", "coarse", "dropped"),
    [
        ([128257, *FIRST, 220, *SECOND, 128258], "raise", [0, 4095], 0),  # special tokens and text
        ([*FIRST[:3], *SECOND, *THIRD], "resync", [4095, 7], 3),  # the end of a group is missing
        ([*FIRST[1:], *SECOND], "resync", [4095], 6),  # the start of a group is missing
        ([*FIRST, *SECOND[:3], *SECOND[4:], *THIRD], "resync", [0, 7], 6),  # a token is missing
        ([*FIRST[:3], FIRST[2], *FIRST[3:], *SECOND], "resync", [4095], 8),  # a token occurs twice
        ([*FIRST[:3], PAST_THE_END, *FIRST[3:]], "resync", [0], 1),  # no code of any slot
        ([*FIRST[:6], PAST_THE_END, *SECOND], "resync", [4095], 7),  # code 4096
        ([*FIRST[:3], FIRST[2], *FIRST[3:]], "skip", [0], 1),
        ([*FIRST[:6], PAST_THE_END, FIRST[6]], "skip", [0], 1),
    ],
)
def test_parser_drops_what_is_out_of_order(
    ids: list[int], on_error: tokens.parser.OnError, coarse: list[int], dropped: int
) -> None:
    parser = tokens.TokenParser(ORPHEUS, on_error)
    result = parsed(parser, "feed", [[i] for i in ids])
    assert result[0][0].tolist() == coarse
    assert [len(level[0]) for level in result] == [len(coarse), 2 * len(coarse), 4 * len(coarse)]
    assert parser.dropped == dropped


def test_parser_raises() -> None:
    parser = tokens.TokenParser(ORPHEUS, "raise")
    with pytest.raises(ValueError, match="code of slot 2, 136458 to 140553, got 128266"):
        parser.feed([*FIRST[:2], FIRST[0]])
    with pytest.raises(ValueError, match='"resync"` needs a layout with a `slot_step`'):
        tokens.TokenParser(TokenLayout((4, 2, 1)))


@settings(deadline=None)
@given(groups=st.integers(0, 5), places=PLACES)
def test_mini_omni_parser(groups: int, places: list[int]) -> None:
    expected = codes((4, 2, 1), groups)
    streams = np.asarray(tokens.mini_omni_streams(expected))[0]
    bounds = [0, *sorted(place % (groups + 9) for place in places), groups + 8]
    parser = tokens.MiniOmniParser("raise")
    pieces = [streams[:, low:high] for low, high in itertools.pairwise(bounds)]
    assert_equal(parsed(parser, "feed", pieces), expected)
    assert parser.finished
    assert parser.dropped == 0
