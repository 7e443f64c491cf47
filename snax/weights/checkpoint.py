"""A SNAC in an Orbax directory: its parameters as the state, its configuration as the checkpoint's metadata.

Orbax writes it. TensorStore, in which Orbax keeps arrays, reads it: Orbax's own `load` takes two to three times as long
for so many small arrays. Both are imported where they are used, because Orbax takes a quarter of a second.
"""

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from .. import json_text
from ..codec.config import SNACConfig
from ..codec.model import SNAC

# Counts up when parameters change their layout, which shapes alone need not show.
FORMAT = 1


def save(model: SNAC, path: str | os.PathLike[str]) -> None:
    """Writes `model` to a new Orbax directory, whole or not at all.

    Args:
        path: a folder that does not exist, or a URL that Orbax can write, such as `gs://bucket/model`.

    Raises:
        FileExistsError: if there is something at `path` already.
    """
    from orbax.checkpoint import v1 as ocp

    path = _absolute(path)
    if os.path.exists(path):
        raise FileExistsError(f"{path} already exists.")
    parameters = nnx.as_pure(nnx.state(model, nnx.Param))
    metadata = {"format": FORMAT, "config": model.config.to_dict()}
    ocp.save(path, parameters, custom_metadata=metadata)


def restore(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    sharding: jax.sharding.Sharding | None = None,
    precision: str = "highest",
) -> SNAC:
    """The model that `save` wrote to `path`; the arguments are those of `snax.load`.

    Raises:
        ValueError: if the directory holds no SNAC, other parameters than its configuration has, or damaged ones.
    """
    path = _absolute(path)
    metadata = _read_json(path, "_CHECKPOINT_METADATA")
    config = _config(path, metadata.get("custom_metadata"))
    if metadata.get("commit_timestamp_nsecs") is None:
        raise ValueError(f"{path} is incomplete: the process that wrote it was stopped.")
    tree = _read_json(path, "state/_METADATA")
    try:
        names = [".".join(key["key"] for key in entry["key_metadata"]) for entry in tree["tree_metadata"].values()]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its list of parameters can't be read.") from error
    graph, state = nnx.split(SNAC(config, precision=precision, rngs=None))
    leaves, structure = jax.tree.flatten_with_path(nnx.as_pure(state))
    expected = {jax.tree_util.keystr(keys, simple=True, separator="."): leaf.shape for keys, leaf in leaves}
    arrays = _read_arrays(path, names, expected)
    placed = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def on_devices(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, placed, lambda index: array[index])

    parameters = [on_devices(arrays[name].astype(dtype, copy=False)) for name in expected]
    return nnx.merge(graph, jax.tree.unflatten(structure, parameters))


def _read_json(path: str, name: str) -> dict[str, Any]:
    """One of the small files that Orbax keeps in a checkpoint."""
    import tensorstore

    try:
        content = tensorstore.KvStore.open(_store(path)).result().read(name).result()
        if content.state != "value":
            raise FileNotFoundError(f"there is no {name}")
        parsed = json_text.parse(content.value)
        if not isinstance(parsed, dict):
            raise ValueError(f"{name} is not a JSON object")
    except (OSError, ValueError) as error:  # TensorStore raises ValueError for most things
        raise ValueError(f"{path} can't be read as an Orbax checkpoint: {error}") from error
    return parsed


def _read_arrays(path: str, names: list[str], expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The parameters of a checkpoint, by name, if their names and shapes are the expected ones."""
    import tensorstore

    context = tensorstore.Context()

    def open_array(name: str) -> Any:
        store = {"driver": "ocdbt", "base": _store(f"{path}/state"), "path": f"{name}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": store}, context=context, open=True)

    def all_at_once(start: Callable[[str], Any]) -> dict[str, Any]:
        try:
            futures = {name: start(name) for name in names}
            return {name: future.result() for name, future in futures.items()}
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or can't be read: {error}") from error

    arrays = all_at_once(open_array)
    _check_shapes(path, {name: array.shape for name, array in arrays.items()}, expected)
    return all_at_once(lambda name: arrays[name].read())


def _store(path: str) -> Any:
    """A folder or a URL as TensorStore takes it."""
    return f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}


def _config(path: str, ours: Any) -> SNACConfig:
    """What `save` said of the model, in the metadata of a checkpoint that may be anyone's."""
    if not isinstance(ours, dict) or "config" not in ours:
        raise ValueError(f"{path} is an Orbax checkpoint, but not of a SNAC: it has no `config` in its metadata.")
    if ours.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {ours.get('format')!r:.100}; this version of snax reads {FORMAT}: convert again."
        )
    try:
        return SNACConfig.from_dict(ours["config"])
    except ValueError as error:
        raise ValueError(f"{path} can't be built: {error}") from error


def _absolute(path: str | os.PathLike[str]) -> str:
    """Orbax wants absolute paths, and says so only when it has begun."""
    return str(path) if "://" in str(path) else os.path.abspath(path)


def _check_shapes(path: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing: {name}" for name in expected.keys() - found.keys()]
    problems += [f"unexpected: {name} {found[name]}" for name in found.keys() - expected.keys()]
    problems += [
        f"mis-shaped: {name} {found[name]}, expected {expected[name]}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if problems:
        raise ValueError(
            f"the parameters in {path} are not those of its configuration, {len(problems)} differences:\n  "
            + "\n  ".join(sorted(problems))
        )


def fingerprint(model: SNAC) -> str:
    """What tells a model's codes from another's: a hash of its configuration and its parameters, in hexadecimal."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for path, parameter in jax.tree.leaves_with_path(nnx.as_pure(nnx.state(model, nnx.Param))):
        array = np.asarray(parameter)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
