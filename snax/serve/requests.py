"""The parameters and bodies of requests, and the header of WAV files."""

import struct
from typing import NamedTuple, cast, get_args

import numpy as np
from jaxtyping import Int32
from starlette.datastructures import QueryParams
from starlette.requests import Request

from .. import json_text
from ..codec.config import SNACConfig
from ..tokens import ORPHEUS, ORPHEUS_NUMBERS, TokenLayout, TokenParser, token_layout
from ..tokens.parser import OnError

Codes = tuple[Int32[np.ndarray, " _"], ...]


class UnsupportedError(ValueError):
    """A type of data that the server does not take."""


class Tokens:
    """The tokens of a stream: either all as text, or all as ids."""

    def __init__(self, layout: TokenLayout, on_error: OnError):
        self.layout = layout
        self._on_error = on_error
        self._parser = TokenParser(layout, on_error)
        self._is_text: bool | None = None

    @property
    def dropped(self) -> int:
        """Number of tokens that were dropped."""
        return self._parser.dropped

    def feed(self, data: str | bytes | list[int]) -> Codes:
        """Return the codes that are complete with these tokens.

        Raises:
            UnsupportedError: if text follows ids, or ids follow text.
            ValueError: if ids are not int32, or, for `on_error="raise"`, if a token is not a code of the next slot.
        """
        is_text = isinstance(data, str)
        if self._is_text is None and is_text and self.layout is ORPHEUS:
            self._parser = TokenParser(ORPHEUS_NUMBERS, self._on_error)
        if self._is_text not in (None, is_text):
            raise UnsupportedError("A stream is either text messages or binary messages, got both. Send one kind.")
        self._is_text = is_text
        if isinstance(data, str):
            return self._parser.feed_text(data)
        if isinstance(data, list):
            return self._parser.feed(data)
        if len(data) % 4:
            raise ValueError(f"Ids must be little-endian int32, 4 bytes each, got {len(data)} bytes.")
        return self._parser.feed(np.frombuffer(data, "<i4").tolist())

    def feed_body(self, content: str, body: bytes) -> Codes:
        """Return the codes of a body.

        Raises:
            ValueError: as `feed`, or if the body is not of the content type.
        """
        if content == "application/octet-stream":
            return self.feed(body)
        if content == "text/plain":
            try:
                return self.feed(body.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"The text must be UTF-8: {error}.") from None
        try:
            parsed = json_text.parse(body)
        except ValueError as error:
            raise ValueError(f'The body must be JSON, {{"tokens": [...]}}: {error}') from None
        ids = parsed.get("tokens") if isinstance(parsed, dict) else None
        if not isinstance(ids, list) or any(type(i) is not int for i in ids):
            raise ValueError(f'The body must be {{"tokens": [...]}} with integers, got {body[:40]!r}.')
        return self.feed(ids)


class Options(NamedTuple):
    """The parameters of a request."""

    format: str
    tokens: Tokens


def parse_options(query: QueryParams, codec: SNACConfig, default_format: str) -> Options:
    values = {
        "format": ("pcm", "wav"),
        "layout": ("orpheus", "shared", "separate"),
        "on_error": get_args(OnError),
    }
    for name, value in query.multi_items():
        if name not in values:
            raise ValueError(f"The parameter `{name}` is not known. There are {', '.join(values)}.")
        if value not in values[name]:
            raise ValueError(f"`{name}` (={value!r}) must be one of {', '.join(values[name])}.")
    name = query.get("layout") or _default_layout(codec)
    on_error = query.get("on_error", "skip" if name == "shared" else "resync")
    tokens = Tokens(token_layout(name, codec), cast(OnError, on_error))
    return Options(query.get("format", default_format), tokens)


def _default_layout(codec: SNACConfig) -> str:
    try:
        token_layout("orpheus", codec)
    except ValueError:
        return "separate"
    return "orpheus"


def content_type(request: Request) -> str:
    content = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content not in ("text/plain", "application/octet-stream", "application/json"):
        raise UnsupportedError(
            f"Content-Type is {content!r}, expected text/plain (text with <custom_token_N>), "
            'application/octet-stream (int32 ids) or application/json ({"tokens": [...]}).'
        )
    return content


def wav_header(sampling_rate: int, samples: int | None) -> bytes:
    """Return the header of mono int16 audio. A length of 0xFFFFFFFF means that it is not known."""
    data = 0xFFFFFFFF if samples is None else 2 * samples
    riff = 0xFFFFFFFF if samples is None else 36 + data
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, sampling_rate, 2 * sampling_rate, 2, 16)
    return struct.pack("<4sI4s", b"RIFF", riff, b"WAVE") + form + struct.pack("<4sI", b"data", data)
