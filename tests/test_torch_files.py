"""Files from strangers: read as tensors or refused."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import small
import snac
import torch
from safetensors.numpy import save_file

import snax
from snax import torch_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch_files.write_folder(small.model(), tmp_path / "model")
    return tmp_path / "model"


def test_written_folder_is_the_references(folder: Path) -> None:
    reference = snac.SNAC.from_pretrained(str(folder))
    with torch.inference_mode():
        expected = reference.encode(torch.from_numpy(small.audio()))
    for ours, theirs in zip(small.model().encode(small.audio()), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_folder_is_not_overwritten(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="already exists"):
        torch_files.write_folder(small.model(), folder)


def test_folder_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_pickle_that_runs_code_is_refused_and_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what looks at it first, and without that by torch, whose advice to let it run is not passed on."""
    victim = tmp_path / "executed"
    state_dict = torch.load(folder / "pytorch_model.bin", weights_only=True) | {"payload": Payload(victim)}
    for check in (torch_files._check_pickle, lambda content: None):
        monkeypatch.setattr(torch_files, "_check_pickle", check)
        for write in (torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))):
            write(state_dict, folder / "pytorch_model.bin")
            with pytest.raises(ValueError, match=r"pytorch_model.bin can't be read as weights") as error:
                snax.load(folder)
            assert "weights_only" not in str(error.value)
            assert not victim.exists()


def test_long_names_in_a_pickle_take_no_time(folder: Path) -> None:
    """torch searches its own refusal for minutes if what it refused has a long name."""
    path = folder / "pytorch_model.bin"
    name = b"long" * 20_000 + b"\nwhat\n"
    for naming in (b"c" + name, b"(i" + name, b"X\4\0\0\0name" * 2 + b"\x93"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"\x80\x04" + naming + b".")
            archive.writestr("archive/version", "3\n")
        with pytest.raises(ValueError, match="its pickle names .*, and weights are of tensors alone") as error:
            snax.load(folder)
        assert len(str(error.value)) < 500


def test_archives_of_old_are_refused(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    state_dict = torch.load(path, weights_only=True)
    torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="no archive such as torch has written since 1.6"):
        snax.load(folder)


def test_parameters_are_tensors_too(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    expected = torch_files.read_state_dict(path)
    state_dict = torch.load(path, weights_only=True)
    torch.save({name: torch.nn.Parameter(tensor.bfloat16()) for name, tensor in state_dict.items()}, path)
    found = torch_files.read_state_dict(path)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=2**-8)  # bfloat16's eight bits


def test_pickles_that_take_all_memory(folder: Path) -> None:
    """Some kilobytes that would become a terabyte: a tensor that repeats one number, many that share what they hold,
    and one that is compressed."""
    path = folder / "pytorch_model.bin"
    state_dict = torch.load(path, weights_only=True)
    name = next(iter(state_dict))
    torch.save(state_dict | {name: torch.zeros(1, dtype=torch.float16).expand(2**20, 2**19)}, path)
    with pytest.raises(ValueError, match="repeat what they hold"):
        snax.load(folder)
    shared = torch.zeros(2**15, dtype=torch.float16)
    torch.save({str(i): shared for i in range(10)}, path)
    with pytest.raises(ValueError, match="or share it, which weights do not"):
        snax.load(folder)
    torch.save(state_dict | {name: torch.zeros(2**22)}, path)
    with zipfile.ZipFile(path) as whole:
        members = {info: whole.read(info) for info in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in members.items():
            archive.writestr(info.filename, content)
    with pytest.raises(ValueError, match="unpacks to more than it is"):
        snax.load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "random", "empty"])
def test_damaged_weights(folder: Path, name: str, damage: str) -> None:
    save_file(torch_files.read_state_dict(folder / "pytorch_model.bin"), folder / "model.safetensors")
    whole = (folder / name).read_bytes()
    damaged = {"truncated": whole[: len(whole) // 2], "random": np.random.default_rng(0).bytes(1000), "empty": b""}
    (folder / name).write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"{name} can't be read as weights"):
        torch_files.read_state_dict(folder / name)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3)])
def test_pickle_of_something_else(folder: Path, content: object) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a dictionary of tensors"):
        snax.load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"encoder_rates": "2, 4"}', '{"layers": 3}', "\udcff"])
@pytest.mark.usefixtures("as_users_see_it")
def test_configuration_that_is_none(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config.json is not the configuration of a SNAC"):
        snax.load(folder)


def test_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is not the configuration of a SNAC.*No such file"):
        snax.load(folder)


def test_configuration_that_does_not_match(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(small.CONFIG.to_dict() | {"codebook_size": 32}))
    with pytest.raises(ValueError, match=r"pytorch_model.bin does not fit .*config.json: .* 3 differences"):
        snax.load(folder)


def test_bfloat16_safetensors(folder: Path) -> None:
    import ml_dtypes

    exact = torch_files.read_state_dict(folder / "pytorch_model.bin")
    save_file({name: array.astype(ml_dtypes.bfloat16) for name, array in exact.items()}, folder / "model.safetensors")
    model = snax.load(folder)
    codebook = exact["quantizer.quantizers.0.codebook.weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(model.quantizer.quantizers[0].codebook[...], codebook)
