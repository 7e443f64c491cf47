"""Checkpoints in the reference's format: reading, writing, and rejection of invalid files."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import snac
import torch
from helpers import small
from safetensors.numpy import save_file

import snax
from snax.weights import torch_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch_files.write_folder(small.model(), tmp_path / "model")
    return tmp_path / "model"


def test_reference_loads_written_folder(folder: Path) -> None:
    reference = snac.SNAC.from_pretrained(str(folder))
    with torch.inference_mode():
        expected = reference.encode(torch.from_numpy(small.audio()))
    for codes, expected_codes in zip(small.model().encode(small.audio()), expected, strict=True):
        np.testing.assert_array_equal(codes, expected_codes)


def test_does_not_overwrite_folder(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="already exists"):
        torch_files.write_folder(small.model(), folder)


def test_failed_write_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        torch_files.write_folder(small.model(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_rejects_pickle_with_code_without_running_it(
    folder: Path, tmp_path: Path, write: Callable[[object, Path], None]
) -> None:
    victim = tmp_path / "executed"
    state_dict = torch.load(folder / "pytorch_model.bin", weights_only=True) | {"payload": Payload(victim)}
    write(state_dict, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read as weights"):
        snax.load(folder)
    assert not victim.exists()


def test_bfloat16_parameters(folder: Path) -> None:
    """A state dict of `torch.nn.Parameter`, as some training scripts save it."""
    path = folder / "pytorch_model.bin"
    exact = torch.load(path, weights_only=True)
    torch.save({name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in exact.items()}, path)
    codebook = exact["quantizer.quantizers.0.codebook.weight"].bfloat16().float()
    np.testing.assert_array_equal(snax.load(folder).quantizer.quantizers[0].codebook[...], codebook)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "random", "empty"])
def test_rejects_corrupt_weights(folder: Path, name: str, damage: str) -> None:
    save_file(torch_files.read_state_dict(folder / "pytorch_model.bin"), folder / "model.safetensors")
    whole = (folder / name).read_bytes()
    contents = {"truncated": whole[: len(whole) // 2], "random": np.random.default_rng(0).bytes(1000), "empty": b""}
    (folder / name).write_bytes(contents[damage])
    with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
        torch_files.read_state_dict(folder / name)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"encoder_rates": "2, 4"}', '{"layers": 3}', "\udcff"])
@pytest.mark.usefixtures("as_users_see_it")
def test_rejects_invalid_configuration(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config.json is not a valid SNAC configuration"):
        snax.load(folder)


def test_rejects_missing_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is not a valid SNAC configuration.*No such file"):
        snax.load(folder)


def test_rejects_weights_of_another_configuration(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(small.CONFIG.to_dict() | {"codebook_size": 32}))
    with pytest.raises(ValueError, match=r"pytorch_model.bin does not match .*config.json: .*\(3 differences\)"):
        snax.load(folder)


def test_bfloat16_safetensors(folder: Path) -> None:
    import ml_dtypes

    exact = torch_files.read_state_dict(folder / "pytorch_model.bin")
    save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in exact.items()}, folder / "model.safetensors")
    model = snax.load(folder)
    codebook = exact["quantizer.quantizers.0.codebook.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(model.quantizer.quantizers[0].codebook[...], codebook)
