"""Codes files: the codes of one audio file and the metadata for decoding them, in safetensors format."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


@dataclasses.dataclass(frozen=True)
class CodesFile:
    """The codes of one audio file and the model that made them.

    Attributes:
        codes: integers, (channels, frames / stride) for each level, coarse to fine.
        model: the argument of `snax.load`.
        fingerprint: see `snax.weights.checkpoint.fingerprint`.
        sampling_rate: of the decoded audio, in Hz.
        samples: length of the audio. Decoded audio is trimmed to it.
    """

    codes: Sequence[Integer[np.ndarray, "channels _"]]
    model: str
    fingerprint: str
    sampling_rate: int
    samples: int

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file. Codes are stored as uint16."""
        levels = {f"codes_{i}": np.ascontiguousarray(level, np.uint16) for i, level in enumerate(self.codes)}
        metadata = {"model": self.model, "fingerprint": self.fingerprint}
        metadata |= {"sampling_rate": str(self.sampling_rate), "samples": str(self.samples), "snax_codes": "1"}
        save_file(levels, path, metadata)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "CodesFile":
        """Read a file that `write` wrote.

        Raises:
            ValueError: if the file is corrupt or is not a codes file.
            OSError: if the file cannot be read.
        """
        with open(path, "rb"):  # Python's error for a missing file is clearer than that of safetensors
            pass
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                levels = [file.get_tensor(f"codes_{i}") for i in range(len(file.keys()))]
            if metadata.get("snax_codes") != "1":
                raise ValueError(f"expected `snax_codes` = 1 in its metadata, got {metadata.get('snax_codes')!r:.100}.")
            shapes = {level.shape[:-1] for level in levels}
            if {len(level.shape) for level in levels} != {2} or len(shapes) != 1 or levels[0].size == 0:
                raise ValueError(
                    f"expected codes of shape (channels, frames), got {[level.shape for level in levels]}."
                )
            if not all(np.issubdtype(level.dtype, np.integer) for level in levels):
                raise ValueError(f"expected integer codes, got {[str(level.dtype) for level in levels]}.")
            return cls(
                levels,
                metadata["model"],
                metadata["fingerprint"],
                int(metadata["sampling_rate"]),
                int(metadata["samples"]),
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a codes file: {error}") from None
