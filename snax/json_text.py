"""Parsing of untrusted JSON."""

import json
from typing import Any


def parse(text: str | bytes) -> Any:
    """Parse JSON. Raise ValueError if `text` is not JSON or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON is nested too deeply.") from None
