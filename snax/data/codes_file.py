"""The codes of one audio file, in a safetensors file with what it takes to decode them."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


@dataclasses.dataclass(frozen=True)
class CodesFile:
    """Codes, (channels, frames / stride) for each level, and where they come from."""

    codes: Sequence[Integer[np.ndarray, "channels _"]]
    model: str  # what `snax.load` takes
    fingerprint: str
    sampling_rate: int
    samples: int

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file; safetensors' own format, codes as the smallest unsigned integers that hold them all."""
        levels = {f"codes_{i}": np.ascontiguousarray(level, np.uint16) for i, level in enumerate(self.codes)}
        said = {"model": self.model, "fingerprint": self.fingerprint}
        said |= {"sampling_rate": str(self.sampling_rate), "samples": str(self.samples), "snax_codes": "1"}
        save_file(levels, path, said)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "CodesFile":
        """Reads what `write` wrote.

        Raises:
            ValueError: for a file that is damaged or not of codes.
            OSError: for a file that can't be read.
        """
        with open(path, "rb"):  # safetensors' own error for a file that is not there says less
            pass
        try:
            with safe_open(path, framework="numpy") as file:
                said = file.metadata() or {}
                levels = [file.get_tensor(f"codes_{i}") for i in range(len(file.keys()))]
            if said.get("snax_codes") != "1":
                raise ValueError(f"{path} is no file of codes that this version of snax reads.")
            shapes = {level.shape[:-1] for level in levels}
            if {len(level.shape) for level in levels} != {2} or len(shapes) != 1 or levels[0].size == 0:
                raise ValueError(f"levels of {[level.shape for level in levels]} are not (channels, frames) each.")
            if not all(np.issubdtype(level.dtype, np.integer) for level in levels):
                raise ValueError(f"levels of {[str(level.dtype) for level in levels]} are not whole numbers.")
            return cls(levels, said["model"], said["fingerprint"], int(said["sampling_rate"]), int(said["samples"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} can't be read as codes: {error}") from None
