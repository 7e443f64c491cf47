"""Codes <-> token sequences of language models, whole or as they arrive."""

from .layout import (
    MINI_OMNI,
    MINI_OMNI_END,
    MINI_OMNI_PAD,
    ORPHEUS,
    ORPHEUS_END,
    ORPHEUS_NUMBERS,
    ORPHEUS_PAD,
    ORPHEUS_START,
    TokenLayout,
    mini_omni_codes,
    mini_omni_streams,
    token_layout,
)
from .parser import MiniOmniParser, TokenParser

__all__ = [
    "MINI_OMNI",
    "MINI_OMNI_END",
    "MINI_OMNI_PAD",
    "ORPHEUS",
    "ORPHEUS_END",
    "ORPHEUS_NUMBERS",
    "ORPHEUS_PAD",
    "ORPHEUS_START",
    "MiniOmniParser",
    "TokenLayout",
    "TokenParser",
    "mini_omni_codes",
    "mini_omni_streams",
    "token_layout",
]
