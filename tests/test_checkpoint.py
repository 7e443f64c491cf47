"""Orbax directories: what comes back, and what is refused."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import small
from orbax.checkpoint import v1 as ocp

import snax


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    snax.save(small.model(), path)
    return path


def test_round_trip(saved: Path) -> None:
    model = snax.load(saved)
    assert model.config == small.CONFIG
    expected = jax.tree.leaves_with_path(small.model())
    for (path, ours), (expected_path, parameter) in zip(jax.tree.leaves_with_path(model), expected, strict=True):
        assert path == expected_path
        np.testing.assert_array_equal(ours, parameter)


def test_more_than_ten_levels_keep_their_order(tmp_path: Path) -> None:
    config = snax.SNACConfig.from_dict(small.CONFIG.to_dict() | {"vq_strides": [1] * 12})
    snax.save(small.model(config), tmp_path / "model")
    audio = small.audio()
    codes = zip(snax.load(tmp_path / "model").encode(audio), small.model(config).encode(audio), strict=True)
    for ours, expected in codes:
        np.testing.assert_array_equal(ours, expected)


def test_nothing_is_overwritten(saved: Path) -> None:
    with pytest.raises(FileExistsError, match="already exists"):
        snax.save(small.model(), saved)


@pytest.mark.slow
def test_nothing_is_there_of_a_save_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import snax
from helpers import small
from etils import epath
killed = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
type(epath.Path("/")).rename = type(epath.Path("/")).replace = os.rename = killed
snax.save(small.model(), {str(tmp_path / "model")!r})
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(tmp_path.iterdir()), "it had not begun to write"
    assert not (tmp_path / "model").exists()


def test_url(saved: Path) -> None:
    model = snax.load(f"file://{saved}")
    np.testing.assert_array_equal(model.encoder.conv_in.kernel[...], small.model().encoder.conv_in.kernel[...])


def test_parameters_are_those_that_orbax_loads(saved: Path) -> None:
    """They are read with TensorStore, by Orbax's layout of a checkpoint."""
    model = snax.load(saved)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), nnx.as_pure(nnx.state(model))
    )
    for ours, array in zip(jax.tree.leaves(model), jax.tree.leaves(ocp.load(saved, abstract)), strict=True):
        np.testing.assert_array_equal(ours, array)


def test_incomplete_checkpoint(saved: Path, tmp_path: Path) -> None:
    """As a stopped process leaves it on storage without atomic renames."""
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "model" / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit_timestamp_nsecs": None}))
    with pytest.raises(ValueError, match="is incomplete: the process that wrote it was stopped"):
        snax.load(tmp_path / "model")


def test_foreign_checkpoint(tmp_path: Path) -> None:
    ocp.save(tmp_path / "other", {"a": np.ones(3)})
    with pytest.raises(ValueError, match="not of a SNAC: it has no `config`"):
        snax.load(tmp_path / "other")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} can't be read as an Orbax checkpoint: there is no _CHECKPOINT"):
        snax.load(tmp_path)


def edit_metadata(path: Path, **changes: object) -> None:
    file = path / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"] |= changes
    file.write_text(json.dumps(metadata))


def test_configuration_that_does_not_match(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    edit_metadata(tmp_path / "model", config=small.CONFIG.to_dict() | {"codebook_size": 32, "noise": False})
    with pytest.raises(ValueError, match="not those of its configuration, 5 differences") as error:
        snax.load(tmp_path / "model")
    assert "mis-shaped: quantizer.quantizers.0.codebook (64, 8), expected (32, 8)" in str(error.value)
    assert "unexpected: decoder.blocks.1.noise.linear.kernel (1, 4, 4)" in str(error.value)


def test_configuration_that_can_not_be_built(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    edit_metadata(tmp_path / "model", config=small.CONFIG.to_dict() | {"codebook_size": -1})
    with pytest.raises(ValueError, match=f"{tmp_path / 'model'} can't be built: `codebook_size` \\(=-1\\) must be"):
        snax.load(tmp_path / "model")


def test_other_format(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    edit_metadata(tmp_path / "model", format=99)
    with pytest.raises(ValueError, match="has format 99; this version of snax reads 1"):
        snax.load(tmp_path / "model")


def test_truncated_data(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    largest = max((tmp_path / "model").rglob("*"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{tmp_path / 'model'} is damaged, or can't be read"):
        snax.load(tmp_path / "model")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tree_metadata": {"a": 1}}', '{"tree_metadata": {}}'])
def test_without_its_list_of_parameters(saved: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "state" / "_METADATA").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path / "model")):
        snax.load(tmp_path / "model")
