"""Checkpoints in the reference's format: `config.json` and `pytorch_model.bin` or `model.safetensors`.

Reading does not need torch. Writing imports it.
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
    """Return the path of the weights in a folder, or None. Prefers safetensors."""
    candidates = [Path(folder, name) for name in (SAFETENSORS_NAME, PICKLE_NAME)]
    return next((path for path in candidates if path.exists()), None)


def read_model(
    weights_path: str | os.PathLike[str], config_path: str | os.PathLike[str], *, precision: str = "highest"
) -> SNAC:
    """Build a model in float32 from a checkpoint of the reference.

    Args:
        weights_path: a PyTorch or safetensors file.
        config_path: the `config.json` of the weights.
        precision: see `snax.load`.

    Raises:
        ValueError: if a file cannot be read, or if the weights do not match the configuration.
    """
    config, state_dict = read_config(config_path), read_state_dict(weights_path)
    try:
        return from_torch(state_dict, config, precision=precision)
    except ValueError as error:
        raise ValueError(f"{weights_path} does not match {config_path}: {error}") from error


def read_config(path: str | os.PathLike[str]) -> SNACConfig:
    """Read a `config.json`. Raise ValueError if it is unreadable or invalid."""
    try:
        return SNACConfig.from_dict(json_text.parse(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a valid SNAC configuration: {error}") from error


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the state dict in a PyTorch or safetensors file, without executing code from the file.

    Args:
        path: a file that ends in `.safetensors`, or a PyTorch checkpoint with any other name.

    Returns:
        The tensors by name, each in the dtype that it has in the file.

    Raises:
        ValueError: if the file is corrupt or contains anything but named tensors.
    """
    path = Path(path)
    try:
        if path.suffix != ".safetensors":
            return read_tensors(path)
        from safetensors.numpy import load_file

        return load_file(path)
    except Exception as error:  # many types, and few of their messages name the file
        raise ValueError(f"{path} cannot be read as weights. It is corrupt or has another format: {error}") from error


def write_folder(model: SNAC, folder: str | os.PathLike[str]) -> None:
    """Write a folder that the reference's `SNAC.from_pretrained(folder)` loads. It is written completely or not at all.

    Args:
        model: the model to write.
        folder: a path that does not exist yet. Its parents are created.

    Raises:
        FileExistsError: if `folder` exists.
        ImportError: if torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError("Writing a PyTorch checkpoint needs torch. Install it with: pip install torch") from error

    folder = Path(folder).absolute()
    if folder.exists():
        raise FileExistsError(f"{folder} already exists. Delete it first or choose another path.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as unfinished:
        contents = Path(unfinished, "folder")
        contents.mkdir()
        config = json.dumps(model.config.to_dict(), indent=2) + "\n"
        (contents / CONFIG_NAME).write_text(config, encoding="utf-8")
        tensors = {name: torch.from_numpy(array.copy()) for name, array in to_torch(model).items()}
        torch.save(tensors, contents / PICKLE_NAME)
        contents.rename(folder)
