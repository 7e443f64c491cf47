"""Models by name: found, downloaded, checked, converted once, and loaded."""

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
    """A model that SNAC's author published: where it is, which revision we know, the hash of its weights, and what its
    `config.json` says."""

    repo_id: str
    revision: str
    sha256: str
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

# Small models that come with this package, as `snax train` wrote them: each in a folder beside this file.
BUNDLED = ("mini_16khz",)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    sharding: jax.sharding.Sharding | None = None,
    precision: str = "highest",
    revision: str | None = None,
) -> SNAC:
    """A trained SNAC: `snax.load("snac_24khz")`.

    A published model, or any other on the hub, is downloaded and converted the first time, and then read from the cache
    of `huggingface_hub`, offline too. `mini_16khz` comes with this package: a small codec for speech, to try things
    with.

    Args:
        name_or_path: a published name (snac_24khz, snac_32khz, snac_44khz), mini_16khz, a folder or URL (such as
            gs://) that `snax.save` wrote, a folder with the reference's config.json and weights, or a hub id,
            `owner/name`.
        dtype: of the parameters, and so of the computation. With bfloat16 many codes differ from float32's.
        sharding: where the parameters go, such as `NamedSharding(mesh, PartitionSpec())` for a copy on each device
            of a mesh. The default is the first local device.
        precision: of matrix products. All but "highest" change codes on TPUs and recent GPUs.
        revision: a commit, tag or branch on the hub. Published names are pinned to the one whose hash is known.

    Raises:
        ValueError: if nothing is known under this name, or what is there is damaged or not a SNAC.
        ConnectionError: if the model is not in the cache, and the hub can't be reached or breaks off.
        FileNotFoundError: if a repository on the hub has no configuration or no weights.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating point, got {jnp.dtype(dtype)}.")
    source = os.fspath(name_or_path)
    if source in BUNDLED:
        source = os.fspath(Path(__file__).parents[1] / source / "weights")
    if source not in PUBLISHED and ("://" in source or os.path.isdir(source)):
        if revision is not None:
            raise ValueError(f"revision (={revision!r}) is for models on the hub; {source} is a path.")
        if (weights_path := torch_files.find_weights(source)) is not None:
            config_path = Path(source, torch_files.CONFIG_NAME)
            model = torch_files.read_model(weights_path, config_path, precision=precision)
            return jax.tree.map(lambda parameter: jax.device_put(parameter.astype(dtype), sharding), model)
    else:
        source = os.fspath(converted(source, revision))
    return checkpoint.restore(source, dtype=dtype, sharding=sharding, precision=precision)


def converted(name: str, revision: str | None = None) -> Path:
    """The Orbax directory of a published name or hub id in the cache, made if it is not there; raises as `load`."""
    # Imported where it is used: with its HTTP client it takes as long as half of JAX.
    from huggingface_hub import cached_assets_path

    repo_id, commit = _commit(name, revision)
    folder = Path(cached_assets_path("snax", namespace=repo_id, subfolder=commit), f"format-{checkpoint.FORMAT}")
    if folder.exists():
        return folder
    if jax.process_count() > 1:
        raise RuntimeError(
            f"{name} has not been converted on this host, and several JAX processes can't do that at once: "
            f"run `python convert/torch_to_flax.py {name}` on each host first."
        )
    weights_path, config_path = download(name, revision)
    model = torch_files.read_model(weights_path, config_path)
    # One process writes, into a folder of another name: whoever comes next finds all of it, or nothing.
    with FileLock(os.fspath(folder.with_suffix(".lock"))):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
            checkpoint.save(model, unfinished)
            unfinished.rename(folder)
    return folder


def download(name: str, revision: str | None = None) -> tuple[Path, Path]:
    """The weights and the configuration of a published name or hub id, in the hub's cache; raises as `load`."""
    repo_id, commit = _commit(name, revision)
    config_path = _download(repo_id, torch_files.CONFIG_NAME, commit)
    published = _published(name)
    if published is None or commit != published.revision:
        try:
            return _download(repo_id, torch_files.SAFETENSORS_NAME, commit), config_path
        except (FileNotFoundError, ConnectionError):  # not there, or not in the cache: then perhaps the other kind is
            return _download(repo_id, torch_files.PICKLE_NAME, commit), config_path
    weights_path = _download(repo_id, torch_files.PICKLE_NAME, commit)
    with open(weights_path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != published.sha256:
        raise ValueError(
            f"{weights_path} is not the published {name}: its sha256 is {sha256}, expected {published.sha256}. "
            "Delete it to download it again."
        )
    if torch_files.read_config(config_path) != published.config:
        raise ValueError(f"{config_path} is not that of the published {name}. Delete it to download it again.")
    return weights_path, config_path


def _published(name: str) -> Published | None:
    by_repo_id = {published.repo_id: published for published in PUBLISHED.values()}
    return PUBLISHED.get(name) or by_repo_id.get(name)


def _commit(name: str, revision: str | None) -> tuple[str, str]:
    """The hub id that `name` stands for, and the commit of `revision`: the pinned one, or as the hub says."""
    published = _published(name)
    if published is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"{name!r} is neither a published model ({', '.join(PUBLISHED)}), nor one that comes with snax "
            f"({', '.join(BUNDLED)}), nor a folder here, nor a hub id, `owner/name`."
        )
    if published is None:
        repo_id, revision = name, revision or "main"
    else:
        repo_id, revision = published.repo_id, revision or published.revision
    if re.fullmatch("[0-9a-f]{40}", revision):
        return repo_id, revision
    return repo_id, _download(repo_id, torch_files.CONFIG_NAME, revision).parent.name


def _download(repo_id: str, filename: str, revision: str) -> Path:
    """A file of the hub in the hub's cache, in a folder named after its commit."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(
            f"the hub has no {repo_id} at revision {revision}, or not for you, nor is it a folder here: {error}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{filename} of {repo_id} is not in the cache and the hub can't be reached: download it elsewhere and "
            "pass the folder, or try again."
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} at revision {revision} has no {filename}: it holds no SNAC.") from error
    except (OSError, ValueError):  # a full disk, say
        raise
    except Exception as error:  # the HTTP client's own kinds
        raise ConnectionError(f"downloading {filename} of {repo_id} broke off, try again: {error}") from error
