"""Parsers that turn the output of a language model into codes while it arrives."""

import re
from collections import deque
from collections.abc import Iterable
from typing import Literal

import numpy as np
from jaxtyping import Int32, Integer

from .layout import MINI_OMNI, MINI_OMNI_END, TokenLayout

OnError = Literal["raise", "skip", "resync"]

_TEXT_TOKEN = re.compile(r"<custom_token_(\d{1,9})>")
# The beginning of such a token at the end of a piece of text.
_TEXT_TOKEN_START = re.compile(r"<(c(u(s(t(o(m(_(t(o(k(e(n(_\d{0,9})?)?)?)?)?)?)?)?)?)?)?)?)?$")


class TokenParser:
    """Collect the tokens of a language model into whole groups of codes.

        parser = TokenParser(ORPHEUS)
        for ids in ...:                 # any number of tokens at a time
            codes = parser.feed(ids)    # for each level (frames / stride,); empty until a group is complete

    Tokens below `layout.first_id` are text or special tokens of the language model, and are ignored.

    Args:
        layout: the layout of the tokens. For text it is that of the numbers, `ORPHEUS_NUMBERS` for Orpheus.
        on_error: what to do with a token that is not a code of the next slot. `"raise"` raises ValueError. `"skip"`
            drops the token. `"resync"` also drops the incomplete group if the token belongs to another slot, and waits
            for the next group.

    Raises:
        ValueError: for `"resync"`, if slots share their tokens, so that the start of a group cannot be seen.
    """

    def __init__(self, layout: TokenLayout, on_error: OnError = "resync"):
        if on_error == "resync" and not layout.slot_step:
            raise ValueError('`on_error="resync"` needs a layout with a `slot_step`. Use "skip" or "raise".')
        self.dropped = 0
        """Number of tokens that were dropped, except ignored ones."""
        self._layout, self._on_error = layout, on_error
        self._group: list[int] = []
        self._text = ""

    def feed(self, tokens: Iterable[int] | Integer[np.ndarray, " _"]) -> tuple[Int32[np.ndarray, " _"], ...]:
        """Add tokens and return the codes of the groups that are complete, one (frames / stride,) array per level.

        Raises:
            ValueError: for `on_error="raise"`, if a token is not a code of the next slot.
        """
        slots, groups = len(self._layout.slots), list[int]()
        for token in map(int, tokens):
            self._add(token)
            if len(self._group) == slots:
                groups += self._group
                self._group = []
        return tuple(np.asarray(level)[0] for level in self._layout.unflatten(np.array([groups], np.int32)))

    def feed_text(self, text: str) -> tuple[Int32[np.ndarray, " _"], ...]:
        """Add a piece of text, cut anywhere, and return codes as `feed` does. The tokens are `<custom_token_N>`."""
        self._text += text
        tokens = list(_TEXT_TOKEN.finditer(self._text))
        rest = self._text[tokens[-1].end() :] if tokens else self._text
        start = _TEXT_TOKEN_START.search(rest)
        self._text = start.group() if start else ""
        return self.feed(int(token[1]) for token in tokens)

    def _add(self, token: int) -> None:
        layout, slot = self._layout, len(self._group)
        lowest = layout.first_id + slot * layout.slot_step
        if lowest <= token < lowest + layout.codebook_size:
            self._group.append(token)
        elif token < layout.first_id:
            return
        elif self._on_error == "raise":
            raise ValueError(
                f"The next token must be a code of slot {slot}, {lowest} to {lowest + layout.codebook_size - 1}, got "
                f"{token}."
            )
        else:
            self.dropped += 1
            if self._on_error == "resync" and self._is_code(token):
                self.dropped += len(self._group)
                self._group = []
                if token < layout.first_id + layout.codebook_size:  # a group starts
                    self.dropped -= 1
                    self._group = [token]

    def _is_code(self, token: int) -> bool:
        """Return whether a token is a code of any slot."""
        slot, code = divmod(token - self._layout.first_id, self._layout.slot_step)
        return slot < len(self._layout.slots) and code < self._layout.codebook_size


class MiniOmniParser:
    """Collect the seven audio streams of mini-omni into whole groups of codes. See `mini_omni_streams`.

    Args:
        on_error: as in `TokenParser`.
    """

    def __init__(self, on_error: OnError = "resync"):
        self.finished = False
        """Whether the end token has arrived. What comes after it is ignored."""
        self._parser = TokenParser(MINI_OMNI, on_error)
        self._count = 0
        self._steps = deque[list[int]](maxlen=7)

    @property
    def dropped(self) -> int:
        """Number of tokens that were dropped."""
        return self._parser.dropped

    def feed(self, streams: Integer[np.ndarray, "7 steps"]) -> tuple[Int32[np.ndarray, " _"], ...]:
        """Add steps of the language model and return the codes of the groups that are complete.

        Args:
            streams: (7, steps), the next tokens of each stream.

        Returns:
            One (frames / stride,) array per level.

        Raises:
            ValueError: as in `TokenParser.feed`.
        """
        tokens: list[int] = []
        for step in np.asarray(streams).T.tolist():
            self._steps.append(step)
            self._count += 1
            if self._count < 8:  # stream i starts after i + 1 steps of padding
                continue
            group = [self._steps[i][i] for i in range(7)]
            self.finished |= group[0] == MINI_OMNI.first_id + MINI_OMNI_END
            if not self.finished:
                tokens += group
        return self._parser.feed(tokens)
