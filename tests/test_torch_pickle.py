"""Comparison of `read_tensors` with `torch.load(weights_only=True)`, and rejection of invalid files."""

import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import snac
import torch

from snax.codec.config import PUBLISHED_CONFIGS
from snax.weights.torch_pickle import read_tensors

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def assert_same_as_torch(path: Path) -> None:
    """Check that names, order, shapes, dtypes and bytes equal those of torch."""
    expected = torch.load(path, map_location="cpu", weights_only=True)
    arrays = read_tensors(path)
    assert list(arrays) == list(expected)
    for name, array in arrays.items():
        tensor = expected[name].detach()
        flat = torch.cat([tensor.flatten()])
        assert array.shape == tuple(tensor.shape), name
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert array.tobytes() == flat.view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_checkpoints_of_the_reference(name: str, tmp_path: Path) -> None:
    torch.save(snac.SNAC(**PUBLISHED_CONFIGS[name].to_dict()).state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_as_torch(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.tensor([0, 1, 2, 100, -1, 0.3, 1e-3, 7], dtype=torch.float64)
    torch.save({"a": values.to(dtype).reshape(2, 1, 4)}, tmp_path / "a.bin")
    assert_same_as_torch(tmp_path / "a.bin")


LARGE = torch.arange(2000, dtype=torch.float32)
TENSORS = {
    "a scalar": torch.tensor(3.0),
    "no elements": torch.zeros(0),
    "no elements in two dimensions": torch.zeros(3, 0),
    "one element, unusual strides": torch.as_strided(LARGE.clone(), (1, 1), (700, 900), 5),
    "many dimensions": torch.arange(64.0).reshape(2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2),
    "a slice": LARGE.clone()[100:200],
    "a slice with steps": LARGE.clone()[5:1000:3],
    "transposed": LARGE.clone().reshape(40, 50).T,
    "permuted": LARGE.clone().reshape(4, 10, 50).permute(2, 0, 1),
    "columns": LARGE.clone().reshape(40, 50)[:, 7:9],
    "infinities": torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0]),
    "large": torch.arange(3_000_000, dtype=torch.float32),
    "a parameter": torch.nn.Parameter(torch.ones(3)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_shapes_and_strides(name: str, tmp_path: Path) -> None:
    torch.save({name: TENSORS[name], "another": torch.ones(2)}, tmp_path / "a.bin")
    assert_same_as_torch(tmp_path / "a.bin")


def test_names_and_metadata(tmp_path: Path) -> None:
    """More than 256 tensors, non-ASCII names with line breaks, and the `_metadata` of a module's state dict."""
    state_dict = OrderedDict((f"ä{i}\n", torch.full((1,), i)) for i in range(300))
    state_dict._metadata = OrderedDict({"": {"version": 1}})
    torch.save(state_dict, tmp_path / "a.bin")
    assert_same_as_torch(tmp_path / "a.bin")


def rewrite(path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Replace the content of each member of the archive by `change(name, content)`."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))


def test_big_endian_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    torch.save({"a": torch.tensor([1.5, 2.5]), "b": torch.tensor([1, 2], dtype=torch.int16)}, path)
    itemsizes = {"0": 4, "1": 2}

    def swap(name: str, content: bytes) -> bytes:
        if name.endswith("byteorder"):
            return b"big"
        folder, _, key = name.rpartition("/")
        if folder.endswith("/data"):
            return np.frombuffer(content, f"u{itemsizes[key]}").byteswap().tobytes()
        return content

    rewrite(path, swap)
    assert_same_as_torch(path)
    np.testing.assert_array_equal(read_tensors(path)["a"], np.array([1.5, 2.5], np.float32))


def shared_storage() -> dict[str, torch.Tensor]:
    whole = torch.arange(10.0)
    return {"a": whole[:5], "b": whole[5:]}


def two_names() -> dict[str, torch.Tensor]:
    tensor = torch.ones(3)
    return {"a": tensor, "b": tensor}


UNSUPPORTED = {
    "two tensors in one storage": (shared_storage(), "two tensors share storage"),
    "one tensor with two names": (two_names(), "two names|share storage"),
    "expanded": ({"a": torch.zeros(1).expand(2**20, 2**20)}, "repeats its elements"),
    "overlapping": ({"a": torch.as_strided(torch.zeros(100), (10, 20), (5, 1))}, "repeats its elements"),
    "a list": ([torch.ones(1)], "EMPTY_LIST"),
    "numbers": ({"a": 1}, "expected a dictionary of tensors"),
    "a tensor": (torch.zeros(3), "expected a dictionary of tensors"),
    "numbers as names": ({1: torch.ones(1)}, "a key of type int"),
    "a dictionary of dictionaries": ({"model": {"a": torch.ones(1)}}, "expected a dictionary of tensors"),
    "a complex tensor": ({"a": torch.ones(1, dtype=torch.complex64)}, "refers to 'torch ComplexFloatStorage'"),
    "a sparse tensor": ({"a": torch.eye(2).to_sparse()}, "refers to 'torch._utils _rebuild_sparse_tensor'"),
    "a module": ({"a": torch.nn.Linear(1, 1)}, r"refers to 'torch.nn.modules.linear Linear'"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_rejects_unsupported_content(name: str, tmp_path: Path) -> None:
    content, message = UNSUPPORTED[name]
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "a.bin")


def test_rejects_compressed_members(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**22)}, tmp_path / "a.bin")
    rewrite(tmp_path / "a.bin", lambda name, content: content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.bin").stat().st_size < 2**16
    with pytest.raises(ValueError, match="its members are compressed"):
        read_tensors(tmp_path / "a.bin")


def test_rejects_overlapping_members(tmp_path: Path) -> None:
    """Two entries of the archive's directory point at the same bytes."""
    torch.save({"a": torch.zeros(2**16), "b": torch.zeros(2**16)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as archive:
        first, second = (archive.getinfo(f"a/data/{key}") for key in "01")
    content = (tmp_path / "a.bin").read_bytes()
    directory = content.rindex(b"a/data/1") - 4  # the offset is the last field before the name
    assert struct.unpack("<I", content[directory : directory + 4]) == (second.header_offset,)
    without_second = content[: second.header_offset] + content[second.header_offset + second.file_size :]
    offset = directory - second.file_size
    overlapping = without_second[:offset] + struct.pack("<I", first.header_offset) + without_second[offset + 4 :]
    (tmp_path / "a.bin").write_bytes(overlapping)
    with pytest.raises(Exception, match="overlap"):
        read_tensors(tmp_path / "a.bin")


def storage(key: bytes = b"0", size: bytes = b"K\x04") -> bytes:
    """Return opcodes that push a storage of four float32 values."""
    text = b"".join(b"X" + struct.pack("<I", len(word)) + word for word in (key, b"cpu"))
    return b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + text + size + b"tQ"


def tensor(offset: bytes, shape: bytes, strides: bytes) -> bytes:
    """Return opcodes that push a tensor in that storage."""
    arguments = storage() + offset + shape + strides + b"\x89)"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


NESTED = b")" + b"q\0h\0\x86" * 200  # tuples that contain the same tuple twice, nested 200 levels deep
MALICIOUS_PICKLES = {
    "an offset beyond the end": tensor(b"K\x01", b"K\x04\x85", b"K\x01\x85"),
    "a shape beyond the end": tensor(b"K\0", b"K\x05\x85", b"K\x01\x85"),
    "strides beyond the end": tensor(b"K\0", b"K\x02\x85", b"K\x04\x85"),
    "a negative offset": tensor(b"J\xff\xff\xff\xff", b"K\x04\x85", b"K\x01\x85"),
    "a negative stride": tensor(b"K\x03", b"K\x04\x85", b"J\xff\xff\xff\xff\x85"),
    "a stride of zero": tensor(b"K\0", b"K\x04\x85", b"K\0\x85"),
    "a shape without strides": tensor(b"K\0", b"K\x04\x85", b")"),
    "a number of 255 bytes": tensor(b"\x8a\xff" + b"\x7f" * 255, b"K\x04\x85", b"K\x01\x85"),
    "a thousand dimensions": tensor(b"K\0", b"(" + b"K\x01" * 1000 + b"t", b"(" + b"K\x01" * 1000 + b"t"),
    "a boolean shape": tensor(b"K\0", b"\x88\x85", b"K\x01\x85"),
    "a storage of the wrong size": b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage(size=b"K\x05")
    + b"K\0K\x04\x85K\x01\x85\x89)tR",
    "a missing storage": b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage(key=b"../version")
    + b"K\0K\x04\x85K\x01\x85\x89)tR",
    "a nested shape": tensor(b"K\0", NESTED, b"K\x01\x85"),
    "a nested name": b"}" + NESTED + b"K\x01s",
    "a nested storage": b"ctorch._utils\n_rebuild_tensor_v2\n(" + NESTED + b"K\0K\x04\x85K\x01\x85\x89)tR",
    "a dictionary of a nested tuple": b"ccollections\nOrderedDict\n" + NESTED + b"\x85R",
    "a memo entry with a huge index": b")r\xff\xff\xff\x7f",
    "a missing memo entry": b"h\x07",
    "an empty stack": b"\x86",
    "no mark": b"K\0t",
    "no STOP opcode": b"",
    "a call of a number": b"K\0)R",
    "an attribute of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\0sb",
    "an object": b"cbuiltins\nobject\n)\x81",
    "a function": b"cos\nsystem\nX\x04\0\0\0true\x85R",
    "a function by its name": b"X\x02\0\0\0osX\x06\0\0\0system\x93",
    "a function of protocol 0": b"(S'true'\nios\nsystem\n",
    "an extension": b"\x82\x01",
    "a name of 80 kB": b"c" + b"long" * 20_000 + b"\nwhat\n",
}


@pytest.mark.parametrize("name", MALICIOUS_PICKLES)
def test_rejects_malicious_pickles(name: str, tmp_path: Path) -> None:
    """Rejection is immediate, with a short message, even if the pickle would need much memory or time."""
    path = tmp_path / "a.bin"
    torch.save({"a": torch.zeros(4)}, path)
    stop = b"" if name == "no STOP opcode" else b"."
    content = b"\x80\x02" + MALICIOUS_PICKLES[name] + stop
    rewrite(path, lambda member, original: content if member.endswith("data.pkl") else original)
    with pytest.raises((ValueError, KeyError, OverflowError)) as error:
        read_tensors(path)
    assert len(str(error.value)) < 500


def test_accepts_valid_pickle(tmp_path: Path) -> None:
    """The pickle from which the malicious ones differ is valid."""
    path = tmp_path / "a.bin"
    torch.save({"a": torch.arange(4.0)}, path)
    entry = b"}X\x01\0\0\0a" + tensor(b"K\0", b"K\x04\x85", b"K\x01\x85") + b"s."
    rewrite(path, lambda member, original: b"\x80\x02" + entry if member.endswith("data.pkl") else original)
    assert_same_as_torch(path)


def test_rejects_files_of_torch_before_1_6(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="Files of torch before 1.6 are not supported"):
        read_tensors(tmp_path / "a.bin")


def test_rejects_other_zip_archives(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.txt", "text")
    (tmp_path / "a.bin").write_bytes(sink.getvalue())
    with pytest.raises(ValueError, match=r"expected one data.pkl in the archive, found 0"):
        read_tensors(tmp_path / "a.bin")
