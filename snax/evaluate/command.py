"""The commands `snax eval` and `snax report`."""

from pathlib import Path
from types import ModuleType
from typing import Annotated

from cyclopts import Parameter

from .. import extras
from ..options import AudioInputs, ModelName


def evaluate(
    inputs: AudioInputs,
    *,
    model: ModelName = "snac_24khz",
    out: Annotated[Path | None, Parameter(alias="-o")] = None,
    json: bool = False,
) -> int:
    """Score a model on audio.

    Args:
        out: Folder for scores.json, clips.jsonl and scores.png.
        json: Print the summary as JSON instead of a table.
    """
    return int(_run().evaluate(inputs, model, out, as_json=json))


def report(
    inputs: AudioInputs,
    *,
    model: ModelName = "snac_24khz",
    out: Annotated[Path, Parameter(alias="-o")] = Path("report.html"),
) -> int:
    """Write an HTML page to compare audio before and after the codec.

    Args:
        out: The page. It must not exist.
    """
    return int(_run().report(inputs, model, out))


def _run() -> ModuleType:
    try:
        import pesq  # noqa: F401  # otherwise it is first imported after the first clip

        from . import run
    except ImportError as error:
        raise extras.missing(error, "eval") from error
    return run
