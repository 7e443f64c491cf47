"""mini_16khz, the codec that comes with snax: it is there, it is small, and it makes speech."""

import subprocess
import sys
from pathlib import Path

import audio
import numpy as np
import pytest
from flax import nnx

import snax
from snax.evaluate import metrics
from snax.train import settings

FOLDER = Path(snax.__file__).parent / "mini_16khz"

# In a process where sockets and torch can't be had.
ALONE = """
import socket, sys
sys.modules["torch"] = None
socket.socket = None
import numpy as np, snax
model = snax.load("mini_16khz")
codes = model.encode(np.zeros((1, 1, 16_000), np.float32))
print(*[level.shape for level in codes], model.decode(codes).shape)
"""


def test_it_needs_neither_network_nor_torch() -> None:
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.stdout == "(1, 16) (1, 32) (1, 64) (1, 1, 16384)\n", done.stderr


def test_it_is_small_and_says_what_it_is() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 6_000_000
    card = (FOLDER / "README.md").read_text()
    for what in (
        "CC-BY-SA-3.0",
        "Allison Smith",
        "Carlo Flora",
        "Maxim Topal",
        "recipes/mini_16khz.toml",
        "curves.png",
    ):
        assert what in card
    recipe = settings.read(Path(__file__).parents[1] / "recipes" / "mini_16khz.toml")
    assert recipe.model == snax.load("mini_16khz").config


@pytest.mark.parametrize("name", ["speech_3s.wav", "speech_7s.wav"])
def test_it_makes_speech(name: str) -> None:
    """Of speakers that it has never heard, on another microphone; with drawn weights it makes none."""
    model = snax.load("mini_16khz")
    untrained = snax.SNAC(model.config, rngs=nnx.Rngs(0))
    clip = audio.clip(name, 16_000, 7)
    target = clip[0, 0].astype(np.float32)
    trained, drawn = (
        metrics.scores(np.asarray(each(clip)[0])[0, 0], target, 16_000, with_pesq=True) for each in (model, untrained)
    )
    assert trained["stoi"] >= 0.8
    for metric in ("mel", "stft"):
        assert trained[metric] < drawn[metric]
    for metric in ("stoi", "pesq"):
        assert trained[metric] > drawn[metric]
