"""Orbax checkpoints: the parameters are the state, the configuration is the custom metadata.

Orbax writes checkpoints. TensorStore, Orbax's storage layer, reads them: Orbax's own `load` takes two to three times as
long for many small arrays. Both are imported inside functions, because importing Orbax takes a quarter of a second.
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

# The version of the parameters' layout. A layout can change while all shapes stay the same.
FORMAT = 1


def save(model: SNAC, path: str | os.PathLike[str]) -> None:
    """Save `model` as a new Orbax checkpoint. The checkpoint is written completely or not at all.

    Args:
        model: the model to save.
        path: a directory that does not exist yet, or a URL that Orbax can write, such as `gs://bucket/model`.

    Raises:
        FileExistsError: if `path` exists.
    """
    from etils import epath  # type: ignore[import-untyped]  # etils has no type hints
    from orbax.checkpoint import v1 as ocp

    path = _absolute(path)
    if epath.Path(path).exists():
        raise FileExistsError(f"{path} already exists. Delete it first or choose another path.")
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
    """Load a model that `save` wrote.

    Args:
        path: the directory or URL of the checkpoint.
        dtype: see `snax.load`.
        sharding: see `snax.load`.
        precision: see `snax.load`.

    Raises:
        ValueError: if the checkpoint is not a SNAC, is corrupt, or its parameters do not match its configuration.
    """
    path = _absolute(path)
    metadata = _read_json(path, "_CHECKPOINT_METADATA")
    config = _config(path, metadata.get("custom_metadata"))
    if metadata.get("commit_timestamp_nsecs") is None:
        raise ValueError(f"{path} is incomplete: the process that wrote it was interrupted. Save it again.")
    tree = _read_json(path, "state/_METADATA")
    try:
        names = [".".join(key["key"] for key in entry["key_metadata"]) for entry in tree["tree_metadata"].values()]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt: its list of parameters cannot be read.") from error
    graph, state = nnx.split(SNAC(config, precision=precision, rngs=None))
    leaves, structure = jax.tree.flatten_with_path(nnx.as_pure(state))
    expected = {jax.tree_util.keystr(keys, simple=True, separator="."): leaf.shape for keys, leaf in leaves}
    arrays = _read_arrays(path, names, expected)
    target_sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def to_devices(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, target_sharding, lambda index: array[index])

    parameters = [to_devices(arrays[name].astype(dtype, copy=False)) for name in expected]
    return nnx.merge(graph, jax.tree.unflatten(structure, parameters))


def _read_json(path: str, name: str) -> dict[str, Any]:
    """Read a JSON file of an Orbax checkpoint."""
    import tensorstore

    try:
        content = tensorstore.KvStore.open(_store(path)).result().read(name).result()
        if content.state != "value":
            raise FileNotFoundError(f"there is no {name}")
        parsed = json_text.parse(content.value)
        if not isinstance(parsed, dict):
            raise ValueError(f"{name} is not a JSON object")
    except (OSError, ValueError) as error:  # TensorStore raises ValueError for most failures
        raise ValueError(f"{path} cannot be read as an Orbax checkpoint: {error}") from error
    return parsed


def _read_arrays(path: str, names: list[str], expected: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read the parameters of a checkpoint. Raise ValueError if their names and shapes are not the expected ones."""
    import tensorstore

    context = tensorstore.Context()

    def open_array(name: str) -> Any:
        store = {"driver": "ocdbt", "base": _store(f"{path}/state"), "path": f"{name}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": store}, context=context, open=True)

    def in_parallel(start: Callable[[str], Any]) -> dict[str, Any]:
        try:
            futures = {name: start(name) for name in names}
            return {name: future.result() for name, future in futures.items()}
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is corrupt or unreadable: {error}") from error

    arrays = in_parallel(open_array)
    _check_shapes(path, {name: array.shape for name, array in arrays.items()}, expected)
    return in_parallel(lambda name: arrays[name].read())


def _store(path: str) -> Any:
    """Return TensorStore's key-value store spec for a directory or URL."""
    return f"{path}/" if "://" in path else {"driver": "file", "path": f"{path}/"}


def _config(path: str, metadata: Any) -> SNACConfig:
    """Parse the metadata that `save` writes. It may be missing or have any other content."""
    if not isinstance(metadata, dict) or "config" not in metadata:
        raise ValueError(f"{path} is an Orbax checkpoint but not a SNAC: its metadata has no `config`.")
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {metadata.get('format')!r:.100}, but this version of snax reads format {FORMAT}. "
            "Convert the model again with `snax convert SOURCE OUT`."
        )
    try:
        return SNACConfig.from_dict(metadata["config"])
    except ValueError as error:
        raise ValueError(f"{path} has an invalid configuration: {error}") from error


def _absolute(path: str | os.PathLike[str]) -> str:
    """Return an absolute path, which Orbax requires, or the URL."""
    name = os.fspath(path).removeprefix("file://")  # a URL that etils does not know
    return name if "://" in name else os.path.abspath(name)


def _check_shapes(path: str, shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing: {name}" for name in expected.keys() - shapes.keys()]
    problems += [f"unexpected: {name} {shapes[name]}" for name in shapes.keys() - expected.keys()]
    problems += [
        f"mis-shaped: {name} {shapes[name]}, expected {expected[name]}"
        for name in expected.keys() & shapes.keys()
        if shapes[name] != expected[name]
    ]
    if problems:
        raise ValueError(
            f"The parameters in {path} do not match its configuration ({len(problems)} differences):\n  "
            + "\n  ".join(sorted(problems))
        )


def fingerprint(model: SNAC) -> str:
    """Return the SHA-256 of a model's configuration and parameters, in hexadecimal.

    Codes are only meaningful to a model with the same fingerprint.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for path, parameter in jax.tree.leaves_with_path(nnx.as_pure(nnx.state(model, nnx.Param))):
        array = np.asarray(parameter)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
