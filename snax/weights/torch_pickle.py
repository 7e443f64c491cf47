"""Read the tensors of a PyTorch checkpoint, the zip archive of `torch.save`, into NumPy without torch.

The archive contains a pickle, `data.pkl`, and one member with the bytes of each storage. This module interprets the
pickle itself and supports only the opcodes of a state dict. `pickle.Unpickler` is not safe, even with a restricted
`find_class`: a few bytes can make it allocate gigabytes for its memo, hash nested tuples for hours, or set attributes
of the objects that `find_class` returns.
"""

import io
import os
import pickletools
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch BoolStorage": np.dtype(np.bool_),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch CharStorage": np.dtype(np.int8),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch IntStorage": np.dtype(np.int32),
    "torch LongStorage": np.dtype(np.int64),
    "torch ShortStorage": np.dtype(np.int16),
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read the state dict in a PyTorch checkpoint, without executing code from the file.

    Returns:
        The tensors by name, as read-only arrays, each in its own dtype. They equal those of
        `torch.load(path, weights_only=True)` bit for bit.

    Raises:
        ValueError: if the pickle contains anything but named tensors; if a tensor reaches outside its storage, repeats
            elements or shares its storage; if the archive is compressed.
        Exception: several types, from `zipfile` and NumPy, if the archive is corrupt.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError("it is not a zip archive. Files of torch before 1.6 are not supported")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # torch does not compress members. A compressed or overlapping member could expand to any amount of memory.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its members are compressed; torch writes uncompressed archives")
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise ValueError("its members overlap: together they are larger than the file")
        pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"expected one data.pkl in the archive, found {len(pickles)}")
        folder = pickles[0].removesuffix("data.pkl")
        byteorder = archive.read(folder + "byteorder") if folder + "byteorder" in archive.namelist() else b"little"
        used_keys = set[str]()

        def rebuild_tensor(
            storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
        ) -> np.ndarray:
            if not isinstance(storage, _Storage):
                raise ValueError(f"expected the storage of a tensor, got a {type(storage).__name__}")
            if storage.key in used_keys:
                raise ValueError(f"two tensors share storage {storage.key}")
            used_keys.add(storage.key)
            content = archive.read(f"{folder}data/{storage.key}")
            if len(content) != storage.size * storage.dtype.itemsize:
                raise ValueError(f"storage {storage.key} has {len(content)} bytes, expected {storage.size} elements")
            if byteorder == b"big":
                content = np.frombuffer(content, f"u{storage.dtype.itemsize}").byteswap().tobytes()
            return _strided(content, storage.dtype, offset, shape, strides)

        tensors = _interpret(archive.read(pickles[0]), rebuild_tensor)
    if not isinstance(tensors, dict) or not all(isinstance(value, np.ndarray) for value in tensors.values()):
        raise ValueError("expected a dictionary of tensors")
    if len({id(value) for value in tensors.values()}) < len(tensors):
        raise ValueError("a tensor has two names")
    return tensors


def _strided(content: bytes, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """Return a tensor's view of its storage. `offset` and `strides` are in elements."""
    for counts in ((offset,), shape, strides):
        if not isinstance(counts, tuple) or not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("the offset, shape and strides of a tensor must be non-negative integers")
    # Reject repeated elements: each stride must be larger than the span of all dimensions with smaller strides.
    covered = 0
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= covered:
            raise ValueError(f"a tensor of shape {shape!r:.100} and strides {strides!r:.100} repeats its elements")
        covered += (size - 1) * stride
    if 0 in shape:
        return np.empty(shape, dtype)
    # NumPy raises if the view reaches beyond the buffer.
    bytes_per_step = [stride * dtype.itemsize for stride in strides]
    return np.ndarray(shape, dtype, content, offset * dtype.itemsize, bytes_per_step)


class _Mark:
    """Marks the start of the items of the next tuple or dictionary on the stack."""


def _interpret(content: bytes, rebuild_tensor: Callable[..., np.ndarray]) -> Any:
    """Evaluate the pickle of a state dict. `rebuild_tensor` takes the arguments of torch's `_rebuild_tensor_v2`.

    Values are only moved, compared with strings, and checked for their type. They are never printed or hashed, because
    that takes exponential time for tuples that contain the same tuple twice, nested a hundred levels deep.
    """
    functions: dict[str, Callable[..., Any]] = {
        "collections OrderedDict": lambda: {},
        "torch._utils _rebuild_tensor_v2": rebuild_tensor,
        "torch._utils _rebuild_parameter": lambda data, requires_grad, hooks: data,
    }
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def pop_items() -> list[Any]:
        """Pop everything above the last mark, and the mark."""
        mark = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is _Mark)
        items = stack[mark + 1 :]
        del stack[mark:]
        return items

    def set_items(pairs: Sequence[Any]) -> None:
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(name, str):
                raise ValueError(
                    f"expected a dictionary with tensor names as keys, got a key of type {type(name).__name__}"
                )
            stack[-1][name] = value

    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(content)):
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    (result,) = stack
                    return result
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "MARK":
                    stack.append(_Mark)
                case "TUPLE":
                    stack.append(tuple(pop_items()))
                case "SETITEM":
                    value, name = stack.pop(), stack.pop()
                    set_items([name, value])
                case "SETITEMS":
                    set_items(pop_items())
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    if argument not in functions and argument not in _DTYPES:
                        raise ValueError(f"its pickle refers to {argument!r:.100}, which a state dict does not need")
                    stack.append(functions.get(argument) or _DTYPES[argument])
                case "BINPERSID":
                    kind, dtype, key, _, size = stack.pop()
                    if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
                        raise ValueError("its pickle refers to something other than a storage")
                    if type(size) is not int:
                        raise ValueError(f"the size of storage {key:.100} is not an integer")
                    stack.append(_Storage(key, dtype, size))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(stack.pop()(*arguments))
                case "BUILD":  # attributes of a state dict, such as torch's `_metadata`
                    stack.pop()
                case _:
                    raise ValueError(f"its pickle has the opcode {opcode.name}, which a state dict does not need")
    except (LookupError, StopIteration, TypeError) as error:  # an operand is missing or has the wrong type
        raise ValueError(f"its pickle is corrupt: {error!r:.200}") from error
    raise ValueError("its pickle has no STOP opcode")
