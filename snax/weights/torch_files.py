"""Checkpoints as the reference keeps them: a `config.json` beside a `pytorch_model.bin` or a `model.safetensors`.

Reading needs no torch. Writing does, and imports it then.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np

from .. import json_text
from ..codec.config import SNACConfig
from ..codec.model import SNAC
from .torch_pickle import read_tensors
from .torch_weights import from_torch, to_torch

CONFIG_NAME = "config.json"
SAFETENSORS_NAME, PICKLE_NAME = "model.safetensors", "pytorch_model.bin"


def find_weights(folder: str | os.PathLike[str]) -> Path | None:
    """The weights in a folder, if it has some; of both kinds, safetensors."""
    candidates = [Path(folder, name) for name in (SAFETENSORS_NAME, PICKLE_NAME)]
    return next((path for path in candidates if path.exists()), None)


def read_model(
    weights_path: str | os.PathLike[str], config_path: str | os.PathLike[str], *, precision: str = "highest"
) -> SNAC:
    """The model that the reference would make of these two files, in float32.

    Raises:
        ValueError: if a file can't be read, or the two do not fit each other.
    """
    config, state_dict = read_config(config_path), read_state_dict(weights_path)
    try:
        return from_torch(state_dict, config, precision=precision)
    except ValueError as error:
        raise ValueError(f"{weights_path} does not fit {config_path}: {error}") from error


def read_config(path: str | os.PathLike[str]) -> SNACConfig:
    """The configuration in a `config.json`; raises ValueError if it can't be read or can't be built."""
    try:
        return SNACConfig.from_dict(json_text.parse(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not the configuration of a SNAC: {error}") from error


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The named tensors in a PyTorch checkpoint or a safetensors file, each in its own dtype. No code in it is run.

    Raises:
        ValueError: if the file is damaged, or holds anything but named tensors.
    """
    path = Path(path)
    try:
        if path.suffix != ".safetensors":
            return read_tensors(path)
        from safetensors.numpy import load_file  # not needed by everyone who imports snax

        return load_file(path)
    except Exception as error:  # of many kinds, few of which name the file
        raise ValueError(f"{path} can't be read as weights, it is damaged or of another kind: {error}") from error


def write_folder(model: SNAC, folder: str | os.PathLike[str]) -> None:
    """Writes a new folder that the reference's `SNAC.from_pretrained(folder)` loads, whole or not at all.

    Raises:
        FileExistsError: if there is something at `folder` already.
        ImportError: if torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("writing a PyTorch checkpoint needs torch: `pip install torch`.") from error

    folder = Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} already exists.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        written = Path(unfinished, "folder")
        written.mkdir()
        config = json.dumps(model.config.to_dict(), indent=2) + "\n"
        (written / CONFIG_NAME).write_text(config, encoding="utf-8")
        tensors = {name: torch.from_numpy(array.copy()) for name, array in to_torch(model).items()}
        torch.save(tensors, written / PICKLE_NAME)
        written.rename(folder)
