"""Load models by name: bundled, published, from the hub, or from a path."""

import dataclasses
import hashlib
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from filelock import FileLock
from jax.typing import DTypeLike

from ..codec.config import PUBLISHED_CONFIGS, SNACConfig
from ..codec.model import SNAC
from . import checkpoint, torch_files


@dataclasses.dataclass(frozen=True)
class Published:
    """A model that SNAC's author published on the hub, pinned to one revision."""

    repo_id: str
    revision: str
    sha256: str  # of pytorch_model.bin
    config: SNACConfig


PUBLISHED = {
    "snac_24khz": Published(
        "hubertsiuzdak/snac_24khz",
        "d73ad176a12188fcf4f360ba3bf2c2fbbe8f58ec",
        "4b8164cc6606bfa627f1a784734c1e539891518f1191ed9194fe1e3b9b4bff40",
        PUBLISHED_CONFIGS["snac_24khz"],
    ),
    "snac_32khz": Published(
        "hubertsiuzdak/snac_32khz",
        "c84c6ac842dc7a44a6fb0f3b576ce94b48a7780f",
        "bfee2f057c1e287443786bedab377b5176b430e911417683977b7af71ea3ba65",
        PUBLISHED_CONFIGS["snac_32khz"],
    ),
    "snac_44khz": Published(
        "hubertsiuzdak/snac_44khz",
        "873ebef9718b89660340c6f55a2b515e98cfa1d9",
        "b0a676cbdc8d1cc53186f6d777bc956fb7932ceacdc657a4c3741646e9e7ead0",
        PUBLISHED_CONFIGS["snac_44khz"],
    ),
}

# Models that are part of this package, each in the folder `snax/NAME`. `snax train` wrote them.
BUNDLED = ("mini_16khz",)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    sharding: jax.sharding.Sharding | None = None,
    precision: str = "highest",
    revision: str | None = None,
) -> SNAC:
    """Load a trained SNAC: `snax.load("snac_24khz")`.

    A model from the hub is downloaded and converted on first use. Later calls read the converted model from the cache
    of `huggingface_hub` and work offline. `mini_16khz`, a small speech codec for experiments, is part of this package.

    Args:
        name_or_path: a published name (snac_24khz, snac_32khz, snac_44khz), mini_16khz, a directory or URL (such as
            gs://) that `snax.save` wrote, a directory with the reference's config.json and weights, or the id of a
            repository on the hub, `owner/name`.
        dtype: the dtype of the parameters and of the computation. bfloat16 changes many codes.
        sharding: the sharding of the parameters. For example, `NamedSharding(mesh, PartitionSpec())` copies them to
            each device of a mesh. Defaults to the first local device.
        precision: the precision of matrix products. Values other than "highest" change codes on TPUs and recent GPUs.
        revision: a commit, tag or branch on the hub. Defaults to a pinned commit for published names and to `main` for
            other repositories.

    Raises:
        ValueError: if there is no model with this name, or if it is corrupt or not a SNAC.
        ConnectionError: if the model is not in the cache and the download fails.
        FileNotFoundError: if a repository on the hub has no configuration or no weights.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`dtype` (={jnp.dtype(dtype)}) must be a floating-point type.")
    source = os.fspath(name_or_path)
    if source in BUNDLED:
        source = os.fspath(Path(__file__).parents[1] / source / "weights")
    if source not in PUBLISHED and ("://" in source or os.path.isdir(source)):
        if revision is not None:
            raise ValueError(f"`revision` (={revision!r}) applies to models on the hub, but {source} is a path.")
        if (weights_path := torch_files.find_weights(source)) is not None:
            config_path = Path(source, torch_files.CONFIG_NAME)
            model = torch_files.read_model(weights_path, config_path, precision=precision)
            return jax.tree.map(lambda parameter: jax.device_put(parameter.astype(dtype), sharding), model)
    else:
        source = os.fspath(converted(source, revision))
    return checkpoint.restore(source, dtype=dtype, sharding=sharding, precision=precision)


def converted(name: str, revision: str | None = None) -> Path:
    """Return the path of a converted model in the cache. Download and convert the model if it is not cached.

    Args:
        name: a published name, or the id of a repository on the hub.
        revision: see `load`.

    Raises:
        RuntimeError: if the model is not cached and several JAX processes run.
        ValueError, ConnectionError, FileNotFoundError: see `load`.
    """
    # A slow import: half as long as JAX's, because of the HTTP client.
    from huggingface_hub import cached_assets_path

    repo_id, commit = _commit(name, revision)
    folder = Path(cached_assets_path("snax", namespace=repo_id, subfolder=commit), f"format-{checkpoint.FORMAT}")
    if folder.exists():
        return folder
    if jax.process_count() > 1:
        raise RuntimeError(
            f"{name} has not been converted on this host, and a job of several JAX processes cannot convert it. "
            f"Run `snax convert {name}` on each host first, or run `snax convert {name} OUT` once and load OUT."
        )
    weights_path, config_path = download(name, revision)
    model = torch_files.read_model(weights_path, config_path)
    # One process writes, under a temporary name. Readers find the complete model or none.
    with FileLock(os.fspath(folder.with_suffix(".lock"))):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
            checkpoint.save(model, unfinished)
            unfinished.rename(folder)
    return folder


def download(name: str, revision: str | None = None) -> tuple[Path, Path]:
    """Download a model to the hub's cache.

    Args:
        name: a published name, or the id of a repository on the hub.
        revision: see `load`.

    Returns:
        The paths of the weights and of the configuration.

    Raises:
        ValueError, ConnectionError, FileNotFoundError: see `load`.
    """
    repo_id, commit = _commit(name, revision)
    config_path = _download(repo_id, torch_files.CONFIG_NAME, commit)
    published = _published(name)
    if published is None or commit != published.revision:
        try:
            return _download(repo_id, torch_files.SAFETENSORS_NAME, commit), config_path
        except (FileNotFoundError, ConnectionError):  # offline, only the other format may be in the cache
            return _download(repo_id, torch_files.PICKLE_NAME, commit), config_path
    weights_path = _download(repo_id, torch_files.PICKLE_NAME, commit)
    with open(weights_path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != published.sha256:
        raise ValueError(
            f"{weights_path} is not the published {name}: its sha256 is {sha256}, expected {published.sha256}. "
            "Delete the file to download it again."
        )
    if torch_files.read_config(config_path) != published.config:
        raise ValueError(
            f"{config_path} is not the configuration of the published {name}. Delete the file to download it again."
        )
    return weights_path, config_path


def _published(name: str) -> Published | None:
    by_repo_id = {published.repo_id: published for published in PUBLISHED.values()}
    return PUBLISHED.get(name) or by_repo_id.get(name)


def _commit(name: str, revision: str | None) -> tuple[str, str]:
    """Return the repository id of a model, and the commit of `revision`: the pinned one, or the hub's answer."""
    published = _published(name)
    if published is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"{name!r} is neither a published model ({', '.join(PUBLISHED)}), nor a bundled model "
            f"({', '.join(BUNDLED)}), nor an existing directory, nor the id of a repository on the hub, `owner/name`."
        )
    if published is None:
        repo_id, revision = name, revision or "main"
    else:
        repo_id, revision = published.repo_id, revision or published.revision
    if re.fullmatch("[0-9a-f]{40}", revision):
        return repo_id, revision
    return repo_id, _download(repo_id, torch_files.CONFIG_NAME, revision).parent.name


def _download(repo_id: str, filename: str, revision: str) -> Path:
    """Download a file to the hub's cache. The name of its parent folder is the commit."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(
            f"The hub has no repository {repo_id} at revision {revision}, or it is private, and there is no local "
            f"directory {repo_id}: {error}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{filename} of {repo_id} is not in the cache, and the hub cannot be reached. Try again, or download the "
            "files on another machine and pass their folder."
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} at revision {revision} has no {filename}, so it is not a SNAC.") from error
    except (OSError, ValueError):  # for example a full disk
        raise
    except Exception as error:  # the HTTP client has its own exception types
        raise ConnectionError(f"Download of {filename} of {repo_id} failed. Try again: {error}") from error
