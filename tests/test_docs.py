"""What README and documentation show: Python is run, commands are as far as their options; the site is built."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import recordings, small

import snax
from snax import cli
from snax.extract.config import ExtractConfig
from snax.extract.run import extract

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader sits: with some audio, and tokens of it."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copy(recordings.DATA / "speech_3s.wav", folder / "speech.wav")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    inputs, out = [str(folder / "speech.wav")], str(folder / "tokens")
    extract(small.model(), ExtractConfig(inputs, out=out, model="small", num_decoders=1))
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python(page: Path, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other, with a small codec under the published name: each does what it says, or raises."""
    config = dataclasses.replace(small.CONFIG, codebook_size=4096)  # for Orpheus' tokens
    monkeypatch.setattr(snax, "load", lambda name: small.model(config))
    monkeypatch.chdir(desk)
    shutil.rmtree("my_model", ignore_errors=True)
    names: dict[str, object] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), names)
    if "decoded" in names:
        assert np.isfinite(np.asarray(names["decoded"])).all()


def commands(page: Path) -> list[list[str]]:
    """Of a page's shell blocks, without comments; lines that end with a backslash go on."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if '"' not in line]
    return [line for line in lines if line]


def test_commands() -> None:
    """`snax` takes these options, and the scripts, targets and extras are there."""
    counts = Counter[str]()
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for page in PAGES:
        for program, *arguments in commands(page):
            counts[program] += 1
            if program == "snax":
                cli.app.parse_args(arguments, exit_on_error=False, print_error=False)
            elif program == "python":
                assert arguments[0] == "-m" or (ROOT / arguments[0]).exists(), arguments
            elif program == "make":
                assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text()
            elif program == "pip":
                asked = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
                assert set(",".join(asked).split(",")) - {""} <= extras
    assert min(counts[program] for program in ("snax", "python", "make", "pip")) > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    """Those to files of the repository lead somewhere."""
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not re.match(r"https?://", target):
            assert (page.parent / target).exists(), target


def test_site(tmp_path: Path) -> None:
    """Without a warning (which `--quiet` would hide from `--strict`), with the API's pages made of docstrings."""
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(line, cwd=ROOT, env=os.environ | {"DISABLE_MKDOCS_2_WARNING": "true"}, capture_output=True)
    assert built.returncode == 0, built.stderr.decode()
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in ("snax.load", "snax.SNAC.encode", "snax.StreamDecoder.step", "snax.tokens.TokenLayout.unflatten"):
        assert f'id="{name}"' in api
