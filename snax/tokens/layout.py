"""Codes <-> token sequences of language models.

Tokens come in groups, one per coarse frame. A group has one slot for each of its codes. The order is depth first: each
code comes before the finer codes of the same time. With `vq_strides` (4, 2, 1) a group has 7 slots: coarse, middle,
fine, fine, middle, fine, fine.
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

from ..codec.config import SNACConfig


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """The layout of codes in a flat token sequence.

    The token of a code is `first_id + slot * slot_step + code`, where `slot` is its position in the group. NumPy arrays
    give NumPy arrays, so a data pipeline does not need JAX computations. JAX arrays give JAX arrays, also under `jit`,
    where values are not checked.

    Args:
        vq_strides: strides of the levels, as in `SNACConfig`.
        codebook_size: codes per level.
        first_id: token of code 0 in slot 0.
        slot_step: difference between the tokens of two neighboring slots. With 0 all slots share their tokens.

    Raises:
        ValueError: if `slot_step` makes the tokens of two slots overlap.
    """

    vq_strides: tuple[int, ...]
    codebook_size: int = 4096
    first_id: int = 0
    slot_step: int = 0

    def __post_init__(self) -> None:
        if self.slot_step and self.slot_step < self.codebook_size:
            raise ValueError(f"`slot_step` (={self.slot_step}) must be 0 or at least {self.codebook_size}.")

    @property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """The level of each slot, and the index of its code among the codes of this level in the group."""
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
        """Convert codes to tokens.

        Args:
            codes: one (batch, frames / stride) array per level, coarse to fine.

        Returns:
            (batch, groups * slots).

        Raises:
            ValueError: if the number of levels is wrong or the levels are not whole groups.
        """
        shapes = [np.shape(level) for level in codes]
        batch, groups = shapes[0][0], shapes[0][-1] // self._per_group[0]
        if shapes != [(batch, groups * count) for count in self._per_group]:
            raise ValueError(
                f"`codes` must be one (batch, frames / stride) array for each of `vq_strides` (={self.vq_strides}), "
                f"with a multiple of {self._per_group} codes, got shapes {shapes}."
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
        """Convert tokens to codes, the inverse of `flatten`.

        Args:
            tokens: (batch, groups * slots).

        Returns:
            One (batch, frames / stride) array per level, coarse to fine.

        Raises:
            ValueError: if the last group is incomplete (see `split`). Outside of `jit`, also if a token is not a code
                or belongs to another slot.
        """
        slots = len(self._order)
        if tokens.ndim != 2:
            raise ValueError(
                f"`tokens` must be (batch, tokens), got {tokens.shape}. For one sequence pass `tokens[None]`."
            )
        groups, remainder = divmod(tokens.shape[1], slots)
        if remainder:
            raise ValueError(
                f"The number of tokens (={tokens.shape[1]}) must be a multiple of {slots}, the size of a group. "
                f"Remove the {remainder} tokens of the incomplete group with `split`."
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
        """Split tokens into whole groups and the remainder, which belongs before the next tokens of a stream."""
        end = tokens.shape[1] // len(self._order) * len(self._order)
        return tokens[:, :end], tokens[:, end:]

    @property
    def _per_group(self) -> list[int]:
        """Codes of each level per group."""
        frames = math.lcm(*self.vq_strides)
        return [frames // stride for stride in self.vq_strides]

    @property
    def _order(self) -> np.ndarray:
        """The index of each slot's code if a group is sorted by level."""
        starts = np.cumsum([0, *self._per_group])
        return np.array([starts[level] + i for level, i in self.slots])

    @property
    def _offsets(self) -> np.ndarray:
        return np.array([[self.first_id + slot * self.slot_step for slot in range(len(self.slots))]], np.int32)[None]

    def _check(self, tokens: np.ndarray, by_group: np.ndarray) -> None:
        # The conversion to int32 could wrap a large token to a valid code.
        wrapped = tokens.reshape(by_group.shape) != by_group + self._offsets
        invalid = np.argwhere((by_group < 0) | (by_group >= self.codebook_size) | wrapped)
        if not len(invalid):
            return
        row, group, slot = invalid[0].tolist()
        column, slots = group * len(self.slots) + slot, len(self.slots)
        token, lowest = int(tokens[row, column]), self.first_id + slot * self.slot_step
        message = (
            f"`tokens[{row}, {column}]` (={token}) must be a code of slot {slot}, "
            f"{lowest} to {lowest + self.codebook_size - 1}"
        )
        other, code = divmod(token - self.first_id, self.slot_step) if self.slot_step else (slots, 0)
        if 0 <= other < slots and code < self.codebook_size:
            raise ValueError(f"{message}, but is one of slot {other}. A token before it is missing or extra.")
        raise ValueError(f"{message}. Remove text and special tokens first.")


def _numpy(array: Array | np.ndarray) -> Any:
    """Return `numpy` for NumPy arrays and `jax.numpy` for JAX arrays."""
    return np if isinstance(array, np.ndarray) else jnp


ORPHEUS = TokenLayout((4, 2, 1), first_id=128266, slot_step=4096)
"""The token ids of Orpheus and Maya1. A sequence has `ORPHEUS_START` before it and `ORPHEUS_END` after it."""

ORPHEUS_START, ORPHEUS_END, ORPHEUS_PAD = 128257, 128258, 128263

ORPHEUS_NUMBERS = TokenLayout((4, 2, 1), first_id=10, slot_step=4096)
"""The N of Orpheus' text tokens, `<custom_token_N>`."""

MINI_OMNI = TokenLayout((4, 2, 1), first_id=152000, slot_step=4160)
"""The token ids of mini-omni. Each slot is a stream of its own, see `mini_omni_streams`."""

# Relative to the first id of a stream.
MINI_OMNI_END, MINI_OMNI_PAD = 4096, 4097


def mini_omni_streams(
    codes: Sequence[Integer[Array | np.ndarray, "batch _"]],
) -> Int32[Array | np.ndarray, "batch 7 steps"]:
    """Convert codes of snac_24khz to mini-omni's seven audio streams.

    Stream i starts with i + 1 padding tokens, so that the model generates coarse codes first. It ends with an end token
    and 6 - i padding tokens.

    Args:
        codes: one (batch, frames / stride) array per level, coarse to fine.

    Returns:
        (batch, 7, groups + 8).

    Raises:
        ValueError: as `TokenLayout.flatten`.
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
    """Convert mini-omni's streams to codes, the inverse of `mini_omni_streams`.

    Args:
        streams: (batch, 7, groups + 8).

    Returns:
        One (batch, frames / stride) array per level, coarse to fine.

    Raises:
        ValueError: if the shape is wrong. Outside of `jit`, also if a token at the place of a code is not a code.
    """
    if streams.ndim != 3 or streams.shape[1] != 7 or streams.shape[2] < 8:
        raise ValueError(f"`streams` must be (batch, 7, groups + 8), got {streams.shape}.")
    groups = streams.shape[2] - 8
    tokens = _numpy(streams).stack([streams[:, i, i + 1 : i + 1 + groups] for i in range(7)], axis=2)
    return MINI_OMNI.unflatten(tokens.reshape(len(tokens), 7 * groups))


def token_layout(name: str, config: SNACConfig) -> TokenLayout:
    """Return a layout of language model tokens.

    Args:
        name: "orpheus" for Orpheus' token ids, "shared" for ids from 0 that all slots of a group share, or "separate"
            for ids from 0 with a range of `codebook_size` ids for each slot.
        config: the configuration of the codec.

    Raises:
        ValueError: for "orpheus", if the strides or the codebook size are not those of snac_24khz.
    """
    if name == "orpheus":
        if (config.vq_strides, config.codebook_size) != (ORPHEUS.vq_strides, ORPHEUS.codebook_size):
            raise ValueError(
                f"Orpheus' tokens need `vq_strides` {ORPHEUS.vq_strides} and `codebook_size` {ORPHEUS.codebook_size}; "
                f"this model has {config.vq_strides} and {config.codebook_size}. Use 'shared' or 'separate' tokens."
            )
        return ORPHEUS
    step = {"shared": 0, "separate": config.codebook_size}[name]
    return TokenLayout(config.vq_strides, config.codebook_size, slot_step=step)
