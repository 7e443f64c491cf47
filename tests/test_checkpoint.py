"""Orbax checkpoints: round trips and invalid checkpoints."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils.epath.testing import mock_epath
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
    for (path, loaded), (expected_path, parameter) in zip(jax.tree.leaves_with_path(model), expected, strict=True):
        assert path == expected_path
        np.testing.assert_array_equal(loaded, parameter)


def test_more_than_ten_levels_keep_their_order(tmp_path: Path) -> None:
    config = snax.SNACConfig.from_dict(small.CONFIG.to_dict() | {"vq_strides": [1] * 12})
    snax.save(small.model(config), tmp_path / "model")
    audio = small.audio()
    codes = zip(snax.load(tmp_path / "model").encode(audio), small.model(config).encode(audio), strict=True)
    for level, expected in codes:
        np.testing.assert_array_equal(level, expected)


def test_does_not_overwrite_folders(saved: Path) -> None:
    with pytest.raises(FileExistsError, match="already exists"):
        snax.save(small.model(), saved)


def test_does_not_overwrite_urls() -> None:
    with (
        mock_epath(exists=lambda original, path: path == "gs://bucket/model"),
        pytest.raises(FileExistsError, match="gs://bucket/model already exists"),
    ):
        snax.save(small.model(), "gs://bucket/model")


@pytest.mark.slow
def test_killed_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import snax
from helpers import small
from etils import epath
kill = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
type(epath.Path("/")).rename = type(epath.Path("/")).replace = os.rename = kill
snax.save(small.model(), {str(tmp_path / "model")!r})
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(tmp_path.iterdir()), "the process was killed before it wrote anything"
    assert not (tmp_path / "model").exists()


def test_url(tmp_path: Path) -> None:
    snax.save(small.model(), f"file://{tmp_path}/model")
    model = snax.load(f"file://{tmp_path}/model")
    np.testing.assert_array_equal(model.encoder.conv_in.kernel[...], small.model().encoder.conv_in.kernel[...])


def test_loads_the_same_parameters_as_orbax(saved: Path) -> None:
    """snax reads the files of Orbax with TensorStore."""
    model = snax.load(saved)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), nnx.as_pure(nnx.state(model))
    )
    for loaded, array in zip(jax.tree.leaves(model), jax.tree.leaves(ocp.load(saved, abstract)), strict=True):
        np.testing.assert_array_equal(loaded, array)


def test_rejects_incomplete_checkpoint(saved: Path, tmp_path: Path) -> None:
    """A killed process can leave one on storage without atomic renames."""
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "model" / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit_timestamp_nsecs": None}))
    with pytest.raises(ValueError, match="is incomplete: the process that wrote it was interrupted"):
        snax.load(tmp_path / "model")


def test_rejects_checkpoint_of_another_program(tmp_path: Path) -> None:
    ocp.save(tmp_path / "other", {"a": np.ones(3)})
    with pytest.raises(ValueError, match="not a SNAC: its metadata has no `config`"):
        snax.load(tmp_path / "other")


def test_rejects_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read as an Orbax checkpoint: there is no _CHECKPOINT"):
        snax.load(tmp_path)


def edit_metadata(path: Path, **changes: object) -> None:
    file = path / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"] |= changes
    file.write_text(json.dumps(metadata))


def test_rejects_parameters_of_another_configuration(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    edit_metadata(tmp_path / "model", config=small.CONFIG.to_dict() | {"codebook_size": 32, "noise": False})
    with pytest.raises(ValueError, match=r"do not match its configuration \(5 differences\)") as error:
        snax.load(tmp_path / "model")
    assert "mis-shaped: quantizer.quantizers.0.codebook (64, 8), expected (32, 8)" in str(error.value)
    assert "unexpected: decoder.blocks.1.noise.linear.kernel (1, 4, 4)" in str(error.value)


def test_rejects_invalid_configuration(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    edit_metadata(tmp_path / "model", config=small.CONFIG.to_dict() | {"codebook_size": -1})
    with pytest.raises(
        ValueError, match=f"{tmp_path / 'model'} has an invalid configuration: `codebook_size` \\(=-1\\) must be"
    ):
        snax.load(tmp_path / "model")


def test_rejects_other_format_version(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    edit_metadata(tmp_path / "model", format=99)
    with pytest.raises(ValueError, match="has format 99, but this version of snax reads format 1"):
        snax.load(tmp_path / "model")


def test_rejects_truncated_data(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    largest = max((tmp_path / "model").rglob("*"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{tmp_path / 'model'} is corrupt or unreadable"):
        snax.load(tmp_path / "model")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tree_metadata": {"a": 1}}', '{"tree_metadata": {}}'])
def test_rejects_corrupt_parameter_list(saved: Path, tmp_path: Path, content: str) -> None:
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / "state" / "_METADATA").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path / "model")):
        snax.load(tmp_path / "model")
