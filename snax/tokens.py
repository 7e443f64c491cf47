"""Codes <-> the token sequences of language models.

A group is the codes of one coarse frame, depth first: each code stands before the finer ones that begin with it. With
`vq_strides` (4, 2, 1) that is coarse, middle, fine, fine, middle, fine, fine: 7 slots.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int32, Integer


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Codes in one flat sequence, group after group.

    The token of a code is `first_id + slot * slot_step + code`, slot being its place in the group. With `slot_step` 0
    all slots share their tokens. Works on batches: NumPy arrays give NumPy arrays, without JAX, in a data pipeline;
    JAX arrays give JAX arrays, under `jit` too (where no value can be checked).

    Raises:
        ValueError: for a `slot_step` that makes the slots' tokens overlap.
    """

    vq_strides: tuple[int, ...]
    codebook_size: int = 4096
    first_id: int = 0
    slot_step: int = 0

    def __post_init__(self) -> None:
        if self.slot_step and self.slot_step < self.codebook_size:
            raise ValueError(f"slot_step (={self.slot_step}) must be 0 or at least {self.codebook_size}, a codebook.")

    @property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """The level of each slot's code, and which of that level's codes in the group it is."""
        frames = math.lcm(*self.vq_strides)
        return tuple(
            (level, frame // stride)
            for frame in range(frames)
            for level, stride in enumerate(self.vq_strides)
            if frame % stride == 0
        )

    def flatten(
        self, codes: Sequence[Integer[Array | np.ndarray, "batch _"]]
    ) -> Int32[Array | np.ndarray, "batch tokens"]:
        """The tokens of `codes`, one (batch, frames / stride) array a level.

        Raises:
            ValueError: for another number of levels, or levels that do not make whole groups.
        """
        shapes = [np.shape(level) for level in codes]
        batch, groups = shapes[0][0], shapes[0][-1] // self._per_group[0]
        if shapes != [(batch, groups * count) for count in self._per_group]:
            raise ValueError(
                f"codes must be one (batch, frames / stride) array for each of the strides {self.vq_strides}, "
                f"of whole groups, each {self._per_group} codes, got {shapes}."
            )
        by_group = [
            level.astype(np.int32).reshape(batch, groups, count)
            for level, count in zip(codes, self._per_group, strict=True)
        ]
        ordered = _numpy(codes[0]).concatenate(by_group, axis=2)[..., self._order] + self._offsets
        return ordered.reshape(batch, groups * len(self.slots))

    def unflatten(
        self, tokens: Integer[Array | np.ndarray, "batch tokens"]
    ) -> tuple[Int32[Array | np.ndarray, "batch _"], ...]:
        """`flatten`'s inverse.

        Raises:
            ValueError: for a last group that is incomplete (see `split`); outside of `jit` for tokens of no code, or of
                another slot than the one where they stand.
        """
        slots = len(self._order)
        if tokens.ndim != 2:
            raise ValueError(
                f"tokens must be (batch, tokens), got {tokens.shape}: for one sequence pass `tokens[None]`."
            )
        groups, rest = divmod(tokens.shape[1], slots)
        if rest:
            raise ValueError(
                f"{tokens.shape[1]} tokens are {groups} groups of {slots} and {rest} of an incomplete one: "
                "`split` takes it off."
            )
        by_group = tokens.astype(np.int32).reshape(len(tokens), groups, slots) - self._offsets
        if not isinstance(by_group, jax.core.Tracer):
            self._check(np.asarray(tokens), np.asarray(by_group))
        by_level = by_group[..., np.argsort(self._order)]
        ends = np.cumsum(self._per_group)
        return tuple(
            by_level[..., end - count : end].reshape(len(tokens), groups * count)
            for end, count in zip(ends.tolist(), self._per_group, strict=True)
        )

    def split(
        self, tokens: Integer[Array | np.ndarray, "batch tokens"]
    ) -> tuple[Integer[Array | np.ndarray, "batch _"], Integer[Array | np.ndarray, "batch _"]]:
        """The whole groups, and the tokens after them: to be put before what comes next."""
        whole = tokens.shape[1] // len(self._order) * len(self._order)
        return tokens[:, :whole], tokens[:, whole:]

    @property
    def _per_group(self) -> list[int]:
        frames = math.lcm(*self.vq_strides)
        return [frames // stride for stride in self.vq_strides]

    @property
    def _order(self) -> np.ndarray:
        """Where each slot's code is when a group's codes lie level by level."""
        begins = np.cumsum([0, *self._per_group])
        return np.array([begins[level] + i for level, i in self.slots])

    @property
    def _offsets(self) -> np.ndarray:
        return np.array([[self.first_id + slot * self.slot_step for slot in range(len(self.slots))]], np.int32)[None]

    def _check(self, tokens: np.ndarray, by_group: np.ndarray) -> None:
        # The last of these: numbers that 32 bits do not hold would come round to a code.
        wrapped = tokens.reshape(by_group.shape) != by_group + self._offsets
        wrong = np.argwhere((by_group < 0) | (by_group >= self.codebook_size) | wrapped)
        if not len(wrong):
            return
        row, group, slot = wrong[0].tolist()
        place, slots = group * len(self.slots) + slot, len(self.slots)
        token, lowest = int(tokens[row, place]), self.first_id + slot * self.slot_step
        message = (
            f"tokens[{row}, {place}] (={token}) must be a code of slot {slot}, "
            f"{lowest} to {lowest + self.codebook_size - 1}"
        )
        other, code = divmod(token - self.first_id, self.slot_step) if self.slot_step else (slots, 0)
        if 0 <= other < slots and code < self.codebook_size:
            raise ValueError(f"{message}, but is one of slot {other}: does a token lack before it, or is one too many?")
        raise ValueError(f"{message}: is it text, or a special token?")


def _numpy(array: Array | np.ndarray) -> Any:
    """NumPy's functions for what it can compute, JAX's otherwise."""
    return np if isinstance(array, np.ndarray) else jnp


ORPHEUS = TokenLayout((4, 2, 1), first_id=128266, slot_step=4096)
"""The token ids of Orpheus and Maya1, between `ORPHEUS_START` and `ORPHEUS_END`."""

ORPHEUS_START, ORPHEUS_END, ORPHEUS_PAD = 128257, 128258, 128263

ORPHEUS_NUMBERS = TokenLayout((4, 2, 1), first_id=10, slot_step=4096)
"""The N of Orpheus' tokens as text, `<custom_token_N>`."""

MINI_OMNI = TokenLayout((4, 2, 1), first_id=152000, slot_step=4160)
"""The token ids of mini-omni; its streams are the slots, see `mini_omni_streams`."""

# Counted from the first id of a stream.
MINI_OMNI_END, MINI_OMNI_PAD = 4096, 4097


def mini_omni_streams(
    codes: Sequence[Integer[Array | np.ndarray, "batch _"]],
) -> Int32[Array | np.ndarray, "batch 7 steps"]:
    """The token ids of `codes` (of snac_24khz) in mini-omni's seven audio streams, 8 steps longer than their groups.

    Stream i begins with i + 1 pads and ends with an end and more pads, so that a model says the coarse code first.
    """
    tokens, numpy = MINI_OMNI.flatten(codes), _numpy(codes[0])
    streams = tokens.reshape(len(tokens), tokens.shape[1] // 7, 7).swapaxes(1, 2)

    def special(stream: int, token: int, count: int) -> np.ndarray:
        first_id = MINI_OMNI.first_id + stream * MINI_OMNI.slot_step
        return np.full((len(tokens), count), first_id + token, np.int32)

    delayed = [
        (
            special(i, MINI_OMNI_PAD, i + 1),
            streams[:, i],
            special(i, MINI_OMNI_END, 1),
            special(i, MINI_OMNI_PAD, 6 - i),
        )
        for i in range(7)
    ]
    return numpy.stack([numpy.concatenate(parts, axis=1) for parts in delayed], axis=1)


def mini_omni_codes(
    streams: Integer[Array | np.ndarray, "batch 7 steps"],
) -> tuple[Int32[Array | np.ndarray, "batch _"], ...]:
    """`mini_omni_streams`' inverse.

    Raises:
        ValueError: for another number of streams or fewer than 8 steps; outside of `jit` for tokens that are no codes
            where codes must be.
    """
    if streams.ndim != 3 or streams.shape[1] != 7 or streams.shape[2] < 8:
        raise ValueError(f"streams must be (batch, 7, groups + 8), got {streams.shape}.")
    groups = streams.shape[2] - 8
    tokens = _numpy(streams).stack([streams[:, i, i + 1 : i + 1 + groups] for i in range(7)], axis=2)
    return MINI_OMNI.unflatten(tokens.reshape(len(tokens), 7 * groups))
