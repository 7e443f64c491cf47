"""A SNAC in an Orbax directory: its parameters as the state, its configuration as the checkpoint's metadata."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from orbax.checkpoint import v1 as ocp

from .config import SNACConfig
from .model import SNAC

# Counts up when parameters change their layout, which shapes alone need not show.
FORMAT = 1


def save(model: SNAC, path: str | os.PathLike[str]) -> None:
    """Writes `model` to a new Orbax directory, whole or not at all.

    Args:
        path: a folder that does not exist, or a URL that Orbax can write, such as `gs://bucket/model`.

    Raises:
        FileExistsError: if there is something at `path` already.
    """
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
    try:
        metadata = ocp.metadata(path)
    except Exception as error:  # Orbax and TensorStore raise many kinds, none of which names the checkpoint
        raise ValueError(f"{path} can't be read as an Orbax checkpoint: {error}") from error
    config = _config(path, metadata.custom_metadata)
    if metadata.metadata is None:
        raise ValueError(f"{path} is damaged: it names no parameters.")
    model = nnx.eval_shape(lambda: SNAC(config, precision=precision, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    expected = nnx.as_pure(state)
    _check_shapes(path, _shapes(metadata.metadata), _shapes(expected))
    placed = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed), expected)
    try:
        parameters = ocp.load(path, abstract)
    except Exception as error:
        raise ValueError(f"{path} is damaged, or can't be read: {error}") from error
    return nnx.merge(graph, parameters)


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


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="."): tuple(leaf.shape) for keys, leaf in leaves}


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
