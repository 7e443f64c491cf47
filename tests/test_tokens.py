"""Token layouts, compared with the orders and ids in the code of the language models."""

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
