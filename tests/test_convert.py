"""The two scripts, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import snac
import torch
from helpers import hub, reference, small
from safetensors.torch import save_file

import snax

ROOT = Path(__file__).parents[1]
CONFIG = small.CONFIG.to_dict()


@pytest.fixture(scope="module")
def torch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch")
    model = reference.trained_like(CONFIG, small.audio(samples=4000))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "convert" / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def test_there_and_back(torch_folder: Path, tmp_path: Path) -> None:
    there = run("torch_to_flax.py", torch_folder, tmp_path / "orbax", "--verify")
    assert there.returncode == 0, there.stderr
    print(there.stdout)
    for line in ["latents, largest difference / RMS", "tokens equal, level 2 ", "audio, largest difference"]:
        assert line in there.stdout
    assert there.stdout.count("100.00%") == 3
    back = run("flax_to_torch.py", tmp_path / "orbax", tmp_path / "torch")
    assert back.returncode == 0, back.stderr
    first, last = (snac.SNAC.from_pretrained(str(folder)) for folder in (torch_folder, tmp_path / "torch"))
    audio = torch.from_numpy(small.audio())
    with torch.inference_mode():
        latents = first.encoder(audio)
        torch.testing.assert_close(last.encoder(audio), latents, rtol=0, atol=1e-5 * latents.std().item())


def test_verify_finds_a_difference(torch_folder: Path, tmp_path: Path) -> None:
    from convert import verify

    snax.save(small.model(), tmp_path / "other")
    files = torch_folder / "pytorch_model.bin", torch_folder / "config.json"
    differences = verify.compare_files(snax.load(tmp_path / "other"), *files)
    assert not verify.faithful(differences)
    assert verify.faithful(verify.compare_files(snax.load(torch_folder), *files))


def test_file_with_its_configuration_elsewhere(torch_folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    state_dict = torch.load(torch_folder / "pytorch_model.bin", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, weights)
    done = run("torch_to_flax.py", weights, tmp_path / "orbax", "--config", torch_folder / "config.json")
    assert done.returncode == 0, done.stderr
    for ours, expected in zip(
        snax.load(tmp_path / "orbax").encode(small.audio()), snax.load(torch_folder).encode(small.audio()), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_hub_id_goes_into_the_cache(torch_folder: Path, tmp_path: Path) -> None:
    with hub.running() as running:
        for path in torch_folder.iterdir():
            running.files["someone/snac", "a" * 40, path.name] = path.read_bytes()
        running.aliases["main"] = "a" * 40
        done = run("torch_to_flax.py", "someone/snac", HF_ENDPOINT=running.url, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    cached = Path(done.stdout.strip().removeprefix("someone/snac -> "))
    assert cached.is_relative_to(tmp_path)
    assert snax.load(cached).config == small.CONFIG


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a published model"),
        (["{torch}"], "OUT is missing"),
        (["{torch}", "{torch}"], "already exists"),
        (["{empty}", "{empty}/out"], "has neither model.safetensors nor pytorch_model.bin"),
        (["{torch}", "{empty}/out", "--config", "{empty}/none.json"], "none.json is not the configuration of a SNAC"),
    ],
)
def test_errors(torch_folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    failed = run("torch_to_flax.py", *(a.format(torch=torch_folder, empty=tmp_path) for a in arguments))
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("error: ")
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_argument_at_all_converts_the_published_24khz_model(tmp_path: Path) -> None:
    with hub.running() as running:  # which lacks it: that it was asked for at its pinned revision is what can be seen
        failed = run("torch_to_flax.py", HF_ENDPOINT=running.url, HF_HOME=str(tmp_path))
    assert "error: the hub has no hubertsiuzdak/snac_24khz at revision d73ad176" in failed.stderr
