"""mini_16khz, the codec that comes with snax: it is there, it is small, and it makes speech."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from flax import nnx

import snax
from snax.evaluate import metrics
from snax.train.config import read

FOLDER = Path(snax.__file__).parent / "mini_16khz"

# In a process that can connect to nothing and has no torch.
ALONE = """
import socket, sys
def refuse(*arguments):
    raise AssertionError("the network")
socket.socket.connect = socket.getaddrinfo = refuse
sys.modules["torch"] = None
import numpy as np, snax
model = snax.load("mini_16khz")
codes = model.encode(np.zeros((1, 1, 16_000), np.float32))
print(*[level.shape for level in codes], model.decode(codes).shape)
"""


def test_it_needs_neither_network_nor_torch() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.stdout == "(1, 25) (1, 50) (1, 100) (1, 1, 16000)\n", done.stderr


def test_it_is_small_and_says_what_it_is() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 6_000_000
    card = " ".join((FOLDER / "README.md").read_text().split())
    for what in (
        "CC-BY-SA-3.0",
        "Allison Smith",
        "Carlo Flora",
        "Maxim Topal",
        "recipes/mini_16khz.toml",
        "curves.png",
    ):
        assert what in card
    recipe = read(Path(__file__).parents[1] / "recipes" / "mini_16khz.toml")
    assert recipe.model == snax.load("mini_16khz").config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["held_out.flac", "other_speaker.flac"])
def test_it_makes_speech(name: str) -> None:
    """Of prompts that it was not trained on, and of a speaker and a language that it was not; drawn weights do not."""
    model = snax.load("mini_16khz")
    target, _ = soundfile.read(Path(__file__).parent / "prompts" / name, dtype="float32")
    trained, drawn = (
        metrics.scores(reconstructed(each, target), target, 16_000, with_pesq=True)
        for each in (model, snax.SNAC(model.config, rngs=nnx.Rngs(0)))
    )
    assert trained["stoi"] >= 0.8
    for metric in ("mel", "stft"):
        assert trained[metric] < drawn[metric]
    for metric in ("stoi", "pesq", "si_sdr"):
        assert trained[metric] > drawn[metric]


def reconstructed(model: snax.SNAC, samples: np.ndarray) -> np.ndarray:
    (ours,) = snax.decode_many(model, snax.encode_many(model, [samples]))
    return ours
