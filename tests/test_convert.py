"""`snax convert` and the scripts in convert/, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import snac
import torch
from helpers import hub, recordings, reference, small
from safetensors.torch import save_file

import snax
from snax.weights import verification

ROOT = Path(__file__).parents[1]
CONFIG = small.CONFIG.to_dict()


def save_torch(model: snac.SNAC, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def torch_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = reference.trained_like(CONFIG, small.audio(samples=4000))
    return save_torch(model, tmp_path_factory.mktemp("torch"))


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snax.cli", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def test_conversion_to_orbax_and_back(torch_folder: Path, tmp_path: Path) -> None:
    to_orbax = run(torch_folder, tmp_path / "orbax", "--verify")
    assert to_orbax.returncode == 0, to_orbax.stderr
    for clip in ("speech", "music", "sweep and noise"):
        assert f"{clip}: latents / RMS" in to_orbax.stdout
    assert to_orbax.stdout.count("100.00%") == 9
    assert to_orbax.stdout.endswith("passed\n")
    to_torch = run("--to-torch", tmp_path / "orbax", tmp_path / "torch")
    assert to_torch.returncode == 0, to_torch.stderr
    first, last = (snac.SNAC.from_pretrained(str(folder)) for folder in (torch_folder, tmp_path / "torch"))
    audio = torch.from_numpy(small.audio())
    with torch.inference_mode():
        latents = first.encoder(audio)
        torch.testing.assert_close(last.encoder(audio), latents, rtol=0, atol=1e-5 * latents.std().item())


def test_scripts_are_the_command(torch_folder: Path, tmp_path: Path) -> None:
    for script, source, out in (
        ("torch_to_flax", torch_folder, "orbax"),
        ("flax_to_torch", tmp_path / "orbax", "torch"),
    ):
        line = [sys.executable, ROOT / "convert" / f"{script}.py", source, tmp_path / out]
        subprocess.run(line, check=True, capture_output=True, timeout=300)
    snac.SNAC.from_pretrained(str(tmp_path / "torch"))


def test_verification_rejects_other_weights(torch_folder: Path) -> None:
    files = torch_folder / "pytorch_model.bin", torch_folder / "config.json"
    comparisons = verification.compare_files(small.model(), *files)
    assert not any(clip.passed for clip in comparisons.values())
    assert "FAILED" in verification.table(comparisons)


def test_verification_rejects_a_small_difference(torch_folder: Path) -> None:
    """One weight of the first convolution that is 0.1 % off."""
    model = snax.load(torch_folder)
    kernel = model.encoder.conv_in.kernel
    kernel[...] = kernel[...].at[3, 0, 0].multiply(1.001)
    files = torch_folder / "pytorch_model.bin", torch_folder / "config.json"
    assert not any(clip.passed for clip in verification.compare_files(model, *files).values())


def magnify_rounding(model: snac.SNAC) -> snac.SNAC:
    """Make the encoder subtract two large equal values, so that rounding errors remain of them.

    Two channels of the first residual unit become equal, and its pointwise convolution adds a large multiple of one and
    subtracts that of the other.
    """
    conv_in, unit = model.encoder.block[0], model.encoder.block[1].block[0].block
    with torch.no_grad():
        for conv in (conv_in, unit[1]):
            weight = conv.weight.clone()
            weight[1] = weight[0]
            conv.weight = weight
            conv.bias[1] = conv.bias[0]
        for snake in (unit[0], unit[2]):
            snake.alpha[:, 1] = snake.alpha[:, 0]
        weight = unit[3].weight.clone()
        weight[:, 0] += 1000
        weight[:, 1] -= 1000
        unit[3].weight = weight
    return model


def test_verification_allows_rounding_that_the_reference_has(tmp_path: Path) -> None:
    """A model whose reference exceeds the fixed bound by rounding alone passes, and it fails with a wrong weight."""
    folder = save_torch(magnify_rounding(reference.trained_like(CONFIG, small.audio(samples=4000))), tmp_path / "torch")
    files = folder / "pytorch_model.bin", folder / "config.json"
    comparisons = verification.compare_files(snax.load(folder), *files)
    print(verification.table(comparisons))
    assert max(clip.reference_latents for clip in comparisons.values()) > verification.LATENTS_BOUND
    assert all(clip.passed for clip in comparisons.values())
    model = snax.load(folder)
    kernel = model.encoder.conv_in.kernel
    kernel[...] = kernel[...].at[3, 0, 0].multiply(1.01)
    assert not any(clip.passed for clip in verification.compare_files(model, *files).values())


def test_verification_of_a_trained_model(tmp_path: Path) -> None:
    """mini_16khz, written as a PyTorch checkpoint. Its encoder magnifies rounding on speech."""
    assert run("--to-torch", "mini_16khz", tmp_path / "torch").returncode == 0
    verified = run(tmp_path / "torch", tmp_path / "orbax", "--verify")
    print(verified.stdout)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verified.stdout.endswith("passed\n")


def test_clips_are_resampled_and_full_length() -> None:
    for rate in (16_000, 24_000, 44_100):
        clips = dict(verification.clips(rate))
        assert set(clips) == {"speech", "music", "sweep and noise"}
        for audio in clips.values():
            assert audio.shape == (1, 1, 2 * rate)
            assert audio.dtype == np.float32
            assert 0.01 < audio.std() < 1
    speech = recordings.clip("speech_3s.wav", 16_000, 2)[0, 0]
    np.testing.assert_array_equal(dict(verification.clips(16_000))["speech"][0, 0], speech)


def test_weights_file_with_config_elsewhere(torch_folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    state_dict = torch.load(torch_folder / "pytorch_model.bin", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, weights)
    converted = run(weights, tmp_path / "orbax", "--config", torch_folder / "config.json")
    assert converted.returncode == 0, converted.stderr
    for codes, expected in zip(
        snax.load(tmp_path / "orbax").encode(small.audio()), snax.load(torch_folder).encode(small.audio()), strict=True
    ):
        np.testing.assert_array_equal(codes, expected)


def test_hub_id_is_converted_into_the_cache(torch_folder: Path, tmp_path: Path) -> None:
    with hub.running() as running:
        for path in torch_folder.iterdir():
            running.files["someone/snac", "a" * 40, path.name] = path.read_bytes()
        running.aliases["main"] = "a" * 40
        converted = run("someone/snac", HF_ENDPOINT=running.url, HF_HOME=str(tmp_path))
    assert converted.returncode == 0, converted.stderr
    cached = Path(converted.stdout.strip().removeprefix("someone/snac -> "))
    assert cached.is_relative_to(tmp_path)
    assert snax.load(cached).config == small.CONFIG


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a published model"),
        (["{torch}"], "OUT is missing"),
        (["{torch}", "--to-torch"], "OUT is missing"),
        (["{torch}", "{empty}/out", "--to-torch", "--verify"], "cannot be combined with --to-torch"),
        (["{torch}", "{torch}"], "already exists"),
        (["{empty}", "{empty}/out"], "has neither model.safetensors nor pytorch_model.bin"),
        (["{torch}", "{empty}/out", "--config", "{empty}/none.json"], "none.json"),
    ],
)
def test_errors(torch_folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    failed = run(*(argument.format(torch=torch_folder, empty=tmp_path) for argument in arguments))
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1].startswith("snax: ")
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list(tmp_path.iterdir()) == []


def test_verification_without_snac(torch_folder: Path, tmp_path: Path) -> None:
    """The missing package is reported before anything is converted."""
    code = "import sys; sys.modules['snac'] = None; from snax.cli import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-c", code, "convert", torch_folder, tmp_path / "out", "--verify"]
    failed = subprocess.run(line, capture_output=True, text=True)
    assert failed.returncode == 2
    assert "snac is not installed. In a clone of snax, install it with: pip install '.[convert]'" in failed.stderr
    assert not (tmp_path / "out").exists()


def test_default_is_the_published_24khz_model(tmp_path: Path) -> None:
    """Without arguments, the published model is requested from the hub at its pinned revision."""
    with hub.running() as running:  # an empty hub, so that the request fails
        failed = run(HF_ENDPOINT=running.url, HF_HOME=str(tmp_path))
    assert "hubertsiuzdak/snac_24khz at revision d73ad176" in failed.stderr
