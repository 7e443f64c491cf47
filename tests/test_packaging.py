"""What is published is whole: built, installed in an empty environment, and used where there is no repository."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import hub, recordings, reference, small
from helpers.recordings import DATA
from huggingface_hub import cached_assets_path

import snax
from snax.codec.config import PUBLISHED_CONFIGS
from snax.weights import checkpoint, pretrained, torch_files

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LICENCES = {"LICENSE", "snax/mini_16khz/LICENSE"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is made of it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--quiet", "--outdir", out, ROOT], check=True)
    return out


def tracked(folder: str) -> set[str]:
    """The repository's files in a folder."""
    said = subprocess.run(["git", "ls-files", folder], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(said.stdout.splitlines())


def test_sdist(built: Path) -> None:
    """All of the repository but what is about itself."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names - {"PKG-INFO", ""} == tracked(".") - {".ci/run"}


def test_wheel(built: Path) -> None:
    """The package, the model that comes with it, the licences, and nothing else."""
    (path,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    about = f"snax_codec-{version}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == tracked("snax")
    assert {f"{about}licenses/{name}" for name in LICENCES} < names
    assert path.stat().st_size < 8e6


@pytest.fixture(scope="module")
def programs(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and what it asks for."""
    (wheel,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", wheel], check=True)
    return folder / "bin"


def test_an_empty_environment(programs: Path, tmp_path: Path) -> None:
    """The command, and the package: no torch, no network, no repository."""
    clip = tmp_path / "clip.wav"
    clip.write_bytes((DATA / "speech_3s.wav").read_bytes())
    line = [programs / "snax", "reconstruct", clip, "-m", "mini_16khz"]
    offline = {"HF_HUB_OFFLINE": "1", "PATH": str(programs)}
    subprocess.run(line, cwd=tmp_path, env=offline, check=True)
    assert (tmp_path / "clip.snac.wav").stat().st_size > 90_000
    code = "import sys, snax; assert 'torch' not in sys.modules; print(snax.__file__)"
    said = subprocess.run([programs / "python", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(said.stdout.strip()).is_relative_to(programs.parent)

    # What takes more says what, before anything is done.
    for command, extra in {"extract": "extract", "train": "train", "eval": "eval", "report": "eval"}.items():
        line = [programs / "snax", command, clip, "-o", tmp_path / "out"]
        ended = subprocess.run(line, cwd=tmp_path, env=offline, check=False, capture_output=True, text=True)
        assert ended.returncode == 2
        assert f"pip install '.[{extra}]'" in ended.stderr
        assert "Traceback" not in ended.stderr


@pytest.fixture(scope="module")
def all_extras(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and all extras, whose packages come from this environment."""
    (wheel,) = built.glob("*.whl")
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "extras.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


# Fields of a recipe that would take hours.
SHORTER = [(r"^steps = .*", "steps = 1"), (r"^batch = .*", "batch = 2"), (r"^\[discriminators\]\n(.+\n)*", "")]


def documented_commands() -> dict[str, list[str]]:
    """The `snax` commands of each page that need no cluster and no bucket."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    commands = {}
    for page in pages:
        text = "\n".join(re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
        lines = [line for line in text.splitlines() if line.startswith("snax ") and "gs://" not in line]
        if lines:
            commands[page.stem] = lines
    return commands


@pytest.mark.parametrize("page", documented_commands())
def test_documented_commands(all_extras: Path, page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every `snax` command of a page runs as written, with a small model under the published name."""
    if page == "pods":
        request.getfixturevalue("one_ray_cluster")
    cache = tmp_path / "hub"
    published = pretrained.PUBLISHED["snac_24khz"]
    folder = cached_assets_path("snax", published.repo_id, published.revision, assets_dir=cache / "assets")
    snax.save(small.model(), folder / f"format-{checkpoint.FORMAT}")
    desk = tmp_path / "desk"
    for name in ("music", "corpus", "held_out", "audio/train", "audio/held_out", "speech/train/en", "speech/held_out"):
        (desk / name).mkdir(parents=True)
        shutil.copy(DATA / "speech_3s.wav", desk / name / "a.wav")
    samples, rate = soundfile.read(DATA / "speech_3s.wav")
    for name in ("speech.mp3", "music.flac"):
        soundfile.write(desk / name, samples, rate)
    torch_files.write_folder(small.model(), desk / "SOURCE")
    (desk / "recipes").mkdir()
    for recipe in (ROOT / "recipes").glob("*.toml"):
        text = recipe.read_text()
        for pattern, replacement in SHORTER:
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        (desk / "recipes" / recipe.name).write_text(text)
    environment = os.environ | {
        "PATH": f"{all_extras}:{os.environ['PATH']}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "SHELL": "/bin/bash",
    }
    for command in documented_commands()[page]:
        for path in (desk / "report.html", desk / "OUT"):  # outputs that must be new
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        line = command.replace("MODEL", "mini_16khz")
        if "run/models/8000" in line:
            shutil.copytree(desk / "run" / "models" / "1", desk / "run" / "models" / "8000", dirs_exist_ok=True)
        if line.startswith("snax serve"):
            serve_and_stop(line, desk, environment)
            continue
        ended = subprocess.run(line, shell=True, cwd=desk, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    where = [all_extras / "python", "-c", "import snax; print(snax.__file__)"]
    path = subprocess.run(where, cwd=desk, env=environment, check=True, capture_output=True, text=True).stdout.strip()
    assert Path(path).is_relative_to(all_extras.parent)


def serve_and_stop(line: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a server until it is ready, and stop it."""
    line = f"exec {line.partition('#')[0]} --port 0"  # a free one
    server = subprocess.Popen(line, shell=True, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    while "ready on" not in (text := server.stderr.readline()):
        assert text, "the server has ended"
    server.terminate()
    server.communicate(timeout=60)
    assert server.returncode == 0


# The hash of the published weights is in the code. Here they are others.
LOAD_AND_ENCODE = """
import dataclasses, importlib.util, sys
import numpy as np, snax
from snax.weights import checkpoint, pretrained, torch_files

assert importlib.util.find_spec("torch") is None
audio, codes, sha256 = sys.argv[1:]
published = pretrained.PUBLISHED["snac_24khz"]
pretrained.PUBLISHED["snac_24khz"] = dataclasses.replace(published, sha256=sha256)
np.savez(codes, *snax.load("snac_24khz").encode(np.load(audio)))
"""


def test_published_name_without_torch(programs: Path, tmp_path: Path) -> None:
    """A checkpoint that the reference wrote, from a hub, gives the reference's tokens where there is no torch."""
    config = PUBLISHED_CONFIGS["snac_24khz"].to_dict()
    speech = recordings.clip("speech_3s.wav", config["sampling_rate"], 2)
    torch_model = reference.trained_like(config, speech)
    torch.save(torch_model.state_dict(), tmp_path / "pytorch_model.bin")
    np.save(tmp_path / "audio.npy", speech)
    weights = (tmp_path / "pytorch_model.bin").read_bytes()
    published = pretrained.PUBLISHED["snac_24khz"]
    with hub.running() as running:
        running.files[published.repo_id, published.revision, "pytorch_model.bin"] = weights
        running.files[published.repo_id, published.revision, "config.json"] = json.dumps(config).encode()
        sha256 = hashlib.sha256(weights).hexdigest()
        line = [programs / "python", "-c", LOAD_AND_ENCODE, tmp_path / "audio.npy", tmp_path / "codes.npz", sha256]
        environment = {"HF_ENDPOINT": running.url, "HF_HOME": str(tmp_path / "hub"), "PATH": str(programs)}
        subprocess.run(line, cwd=tmp_path, env=environment, check=True)
    with np.load(tmp_path / "codes.npz") as codes:
        ours = [level[0] for level in codes.values()]
    padded = np.pad(speech[0, 0], (0, -speech.shape[-1] % snax.SNACConfig.from_dict(config).pad_multiple))
    reference.assert_same_codes(torch_model, padded, ours)
