"""Read the tensors of a PyTorch checkpoint, `torch.save`'s zip archive, into NumPy without torch.

The archive holds a pickle, `data.pkl`, and the bytes of each storage as a member of its own. The pickle is interpreted
here, by the few opcodes that a state dict takes. `pickle.Unpickler` would not do, even with `find_class` restricted: a
few bytes can make it allocate gigabytes for its memo, hash nested tuples for hours, or set attributes of the objects
that `find_class` returns.
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
    """The named tensors in a PyTorch checkpoint, each in its own dtype, read-only.

    They equal those of `torch.load(path, weights_only=True)` bit for bit. No code in the file is run.

    Raises:
        ValueError: if the pickle holds anything but named tensors; if tensors reach outside their storage, or share or
            repeat its elements; if the archive is compressed.
        Exception: of several kinds, from `zipfile` and NumPy, if the archive is damaged.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError("it is not a zip archive, which torch has written since 1.6; older files are not read")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # torch stores members as they are. What unpacks to more than the file's size would take any amount of memory.
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its members are compressed, which those of torch's own files are not")
        if sum(member.file_size for member in members) > os.path.getsize(path):
            raise ValueError("its members are larger than the file: they overlap")
        pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"expected one data.pkl in the archive, found {len(pickles)}")
        folder = pickles[0].removesuffix("data.pkl")
        byteorder = archive.read(folder + "byteorder") if folder + "byteorder" in archive.namelist() else b"little"
        used = set[str]()

        def tensor(
            storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
        ) -> np.ndarray:
            if not isinstance(storage, _Storage):
                raise ValueError(f"expected the storage of a tensor, got a {type(storage).__name__}")
            if storage.key in used:
                raise ValueError(f"two tensors share storage {storage.key}, which weights do not")
            used.add(storage.key)
            content = archive.read(f"{folder}data/{storage.key}")
            if len(content) != storage.size * storage.dtype.itemsize:
                raise ValueError(f"storage {storage.key} has {len(content)} bytes, expected {storage.size} elements")
            if byteorder == b"big":
                content = np.frombuffer(content, f"u{storage.dtype.itemsize}").byteswap().tobytes()
            return _strided(content, storage.dtype, offset, shape, strides)

        tensors = _interpret(archive.read(pickles[0]), tensor)
    if not isinstance(tensors, dict) or not all(isinstance(value, np.ndarray) for value in tensors.values()):
        raise ValueError("expected a dictionary of tensors")
    if len({id(value) for value in tensors.values()}) < len(tensors):
        raise ValueError("a tensor has two names, which weights do not")
    return tensors


def _strided(content: bytes, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """The part of a storage that a tensor views. `offset` and `strides` count elements."""
    for counts in ((offset,), shape, strides):
        if not isinstance(counts, tuple) or not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("the offset, shape and strides of a tensor must be whole numbers")
    # No element twice: a step along a dimension must be longer than all that the denser dimensions cover.
    covered = 0
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride <= covered:
            raise ValueError(f"a tensor of shape {shape!r:.100} and strides {strides!r:.100} repeats its elements")
        covered += (size - 1) * stride
    if 0 in shape:
        return np.empty(shape, dtype)
    # NumPy refuses what reaches beyond the buffer.
    bytes_per_step = [stride * dtype.itemsize for stride in strides]
    return np.ndarray(shape, dtype, content, offset * dtype.itemsize, bytes_per_step)


class _Mark:
    """Where on the stack the items of the next tuple or dictionary begin."""


def _interpret(content: bytes, tensor: Callable[..., np.ndarray]) -> Any:
    """Evaluate the pickle of a state dict. `tensor` takes the arguments of torch's `_rebuild_tensor_v2`.

    Values are only moved, compared with strings, and checked for their type. They are never printed or hashed: tuples
    that hold the same tuple twice, a hundred deep, would take forever.
    """
    functions: dict[str, Callable[..., Any]] = {
        "collections OrderedDict": lambda: {},
        "torch._utils _rebuild_tensor_v2": tensor,
        "torch._utils _rebuild_parameter": lambda data, requires_grad, hooks: data,
    }
    stack: list[Any] = []
    memo: dict[Any, Any] = {}

    def items() -> list[Any]:
        """Pop all that was pushed since the last mark."""
        at = len(stack) - 1 - next(i for i, item in enumerate(reversed(stack)) if item is _Mark)
        popped = stack[at + 1 :]
        del stack[at:]
        return popped

    def set_items(pairs: Sequence[Any]) -> None:
        for name, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(name, str):
                raise ValueError(
                    f"expected a dictionary of tensors with names, got a key of type {type(name).__name__}"
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
                    stack.append(tuple(items()))
                case "SETITEM":
                    value, name = stack.pop(), stack.pop()
                    set_items([name, value])
                case "SETITEMS":
                    set_items(items())
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    if argument not in functions and argument not in _DTYPES:
                        raise ValueError(f"its pickle names {argument!r:.100}, and weights are made of tensors alone")
                    stack.append(functions.get(argument) or _DTYPES[argument])
                case "BINPERSID":
                    kind, dtype, key, _, size = stack.pop()
                    if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
                        raise ValueError("its pickle refers to something other than a storage")
                    if type(size) is not int:
                        raise ValueError(f"the size of storage {key:.100} is not a number")
                    stack.append(_Storage(key, dtype, size))
                case "REDUCE":
                    arguments = stack.pop()
                    stack.append(stack.pop()(*arguments))
                case "BUILD":  # attributes of a state dict, such as torch's `_metadata`
                    stack.pop()
                case _:
                    raise ValueError(f"its pickle has {opcode.name}, which that of a state dict does not")
    except (LookupError, StopIteration, TypeError) as error:  # an operand is missing, or of another type
        raise ValueError(f"its pickle is damaged: {error!r:.200}") from error
    raise ValueError("its pickle has no end")
