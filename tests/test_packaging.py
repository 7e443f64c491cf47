"""What is published is whole: built, installed in an empty environment, and used where there is no repository."""

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from audio import DATA

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


def test_an_empty_environment(built: Path, tmp_path: Path) -> None:
    """`pip install` of the wheel and what it asks for, and the command: no torch, no network, no repository."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", wheel], check=True)
    clip = tmp_path / "clip.wav"
    clip.write_bytes((DATA / "speech_3s.wav").read_bytes())
    line = [programs / "snax", "reconstruct", clip, "-m", "mini_16khz"]
    offline = {"HF_HUB_OFFLINE": "1", "PATH": str(programs)}
    subprocess.run(line, cwd=tmp_path, env=offline, check=True)
    assert (tmp_path / "clip.snac.wav").stat().st_size > 90_000
    code = "import sys, snax; assert 'torch' not in sys.modules; print(snax.__file__)"
    said = subprocess.run([programs / "python", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(said.stdout.strip()).is_relative_to(tmp_path / "env")

    # What takes more says what, before anything is done.
    for command, extra in {"extract": "extract", "train": "train", "eval": "eval", "report": "eval"}.items():
        line = [programs / "snax", command, clip, "-o", tmp_path / "out"]
        ended = subprocess.run(line, cwd=tmp_path, env=offline, check=False, capture_output=True, text=True)
        assert ended.returncode == 2
        assert f"pip install 'snax-codec[{extra}]'" in ended.stderr
        assert "Traceback" not in ended.stderr
