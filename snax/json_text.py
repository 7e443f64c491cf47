"""JSON that may be a stranger's."""

import json
from typing import Any


def parse(text: str | bytes) -> Any:
    """What `text` says; raises ValueError for what is no JSON, and for brackets in brackets beyond all measure."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply.") from None
