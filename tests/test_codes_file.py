"""Codes files: round trip and rejection of invalid files."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from snax.data.codes_file import CodesFile

CODES = [np.arange(2 * frames).reshape(2, frames) for frames in (2, 4, 8)]
FILE = CodesFile(CODES, "snac_24khz", "ab" * 32, 24_000, 4000)


def test_round_trip(tmp_path: Path) -> None:
    FILE.write(tmp_path / "a.codes.safetensors")
    file = CodesFile.read(tmp_path / "a.codes.safetensors")
    for level, expected in zip(file.codes, CODES, strict=True):
        assert level.dtype == np.uint16
        np.testing.assert_array_equal(level, expected)
    assert (file.model, file.fingerprint, file.sampling_rate, file.samples) == ("snac_24khz", "ab" * 32, 24_000, 4000)


def test_rejects_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "a.codes.safetensors"
    FILE.write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path} cannot be read as a codes file"):
        CodesFile.read(path)


def test_rejects_other_safetensors_files(tmp_path: Path) -> None:
    save_file({"codes_0": np.zeros((1, 2), np.uint16)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"expected `snax_codes` = 1 in its metadata, got None"):
        CodesFile.read(tmp_path / "a.safetensors")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CodesFile.read(tmp_path / "a.codes.safetensors")
