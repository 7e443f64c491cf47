"""Error messages for values that pydantic rejects."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError


def describe(error: ValidationError, names: Iterable[str] = (), *, options: bool = False) -> str:
    """Describe every rejected value: its name, the value, and what is allowed.

    Args:
        error: the error that pydantic raised.
        names: the dotted names of all fields, to suggest one for an unknown name.
        options: write names as options of a command, `--like-this`.
    """
    names = list(names)
    return " ".join(_describe(problem, names, options) for problem in error.errors(include_url=False))


def _describe(problem: Any, names: list[str], options: bool) -> str:
    name = ".".join(map(str, problem["loc"]))
    name = "--" + name.replace("_", "-") if options else f"`{name}`"
    match problem["type"]:
        case "missing":
            return f"{name} is missing."
        case "unexpected_keyword_argument":
            nearest = get_close_matches(name.strip("`"), names, n=1)
            known = f"Did you mean `{nearest[0]}`?" if nearest else f"The fields are {', '.join(names)}."
            return f"{name} is not a field. {known}"
        case "value_error":
            return f"{name}: {problem['ctx']['error']}"
        case "dataclass_type":
            requirement = "must be a table"
        case "tuple_type":
            requirement = "must be a list"
        case _:  # such as "Input should be greater than 0"
            requirement = re.sub(r"^\w+ should", "must", problem["msg"])
    return f"{name} (={problem['input']!r:.200}) {requirement}."
