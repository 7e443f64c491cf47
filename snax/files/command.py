"""The commands `snax encode`, `decode`, `reconstruct` and `info`."""

from typing import Annotated

from cyclopts import Parameter

from ..options import Channels, ModelName, Output

Files = Annotated[tuple[str, ...], Parameter(help="Files, folders or patterns. `-` is standard input.")]


def encode(
    inputs: Files, *, output: Output = Output(), model: ModelName = "snac_24khz", channels: Channels = "mix"
) -> int:
    """Encode audio files to codes: a.wav to a.codes.safetensors."""
    from . import run

    return run.encode(inputs, output, model, channels)


def decode(
    inputs: Files,
    *,
    output: Output = Output(),
    model: Annotated[ModelName | None, Parameter(alias="-m", help="Default: the model that made the codes.")] = None,
) -> int:
    """Decode files of codes to audio: a.codes.safetensors to a.snac.wav."""
    from . import run

    return run.decode(inputs, output, model)


def reconstruct(
    inputs: Files, *, output: Output = Output(), model: ModelName = "snac_24khz", channels: Channels = "mix"
) -> int:
    """Encode and decode audio files: a.wav to a.snac.wav."""
    from . import run

    return run.reconstruct(inputs, output, model, channels)


def info(
    inputs: Annotated[tuple[str, ...], Parameter(help="Models, audio files, files of codes, outputs of extractions.")],
) -> int:
    """Print facts about models, audio files, files of codes and extractions."""
    from .info import print_facts

    return print_facts(inputs)
