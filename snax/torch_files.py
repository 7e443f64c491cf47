"""Checkpoints as the reference keeps them: a `config.json` beside a `pytorch_model.bin` or a `model.safetensors`.

torch and safetensors are imported where a file of theirs is read or written, and nowhere else.
"""

import json
import os
import pickle
import pickletools
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from . import json_text
from .config import SNACConfig
from .model import SNAC
from .torch_weights import from_torch, to_torch

CONFIG_NAME = "config.json"
SAFETENSORS_NAME, PICKLE_NAME = "model.safetensors", "pytorch_model.bin"

# What the pickle of a state dict names, a module and what is in it.
OF_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z]\w{1,15}Storage"
)


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
        ImportError: if torch or safetensors is needed for the weights and not installed.
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
    """The tensors in a pickle of torch's, of which only tensors are read and no code is run, or in a safetensors file.

    Raises:
        ValueError: if the file is damaged, or holds anything but named tensors.
        ImportError: if torch, or safetensors, is not installed.
    """
    path = Path(path)
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except ImportError as error:
        raise missing_library(str(error.name), path.name) from error
    except Exception as error:  # the two libraries raise many kinds, few of which name the file
        raise ValueError(f"{path} can't be read as weights, it is damaged or of another kind: {error}") from error


def missing_library(library: str, filename: str) -> ImportError:
    """What to do without torch or safetensors."""
    return ImportError(
        f"reading {filename} needs {library}, once: `pip install 'snax-codec[convert]'`. Or convert it where {library} "
        "is installed, `python convert/torch_to_flax.py SOURCE OUT`, and pass OUT to `snax.load`."
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    import torch

    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError("it is no archive such as torch has written since 1.6; older kinds are not read")
    with zipfile.ZipFile(path) as archive:
        # torch writes archives in which nothing is compressed, and would take whatever memory one unpacks to.
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("it unpacks to more than it is, which torch's own files do not")
        for member in archive.infolist():
            if member.filename.endswith("data.pkl"):
                _check_pickle(archive.read(member))
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to do without `weights_only`
        raise ValueError("its pickle is damaged, or holds something else") from error
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise ValueError("expected a dictionary of tensors")
    if sum(tensor.nbytes for tensor in state_dict.values()) > path.stat().st_size:
        raise ValueError("its tensors repeat what they hold, or share it, which weights do not")
    return {name: tensor.detach().float().numpy() for name, tensor in state_dict.items()}


def _check_pickle(content: bytes) -> None:
    """Raises ValueError if a pickle names anything but what tensors are made of.

    torch refuses that too, but searches what it then says in a time that grows with the square of the name's length
    (torch 2.13: 3.7 s for 55 kB).
    """
    for opcode, name, _ in pickletools.genops(content):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not OF_TENSORS.fullmatch(str(name)):
            raise ValueError(f"its pickle names {name!r:.100}, and weights are of tensors alone")


def write_folder(model: SNAC, folder: str | os.PathLike[str]) -> None:
    """Writes a new folder that the reference's `SNAC.from_pretrained(folder)` loads, whole or not at all.

    Raises:
        FileExistsError: if there is something at `folder` already.
        ImportError: if torch is not installed.
    """
    import torch

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
