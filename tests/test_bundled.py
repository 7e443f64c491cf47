"""mini_16khz, the bundled codec: loading, size, model card, and quality."""

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

# A process without network and torch.
SCRIPT = """
import socket, sys
def fail(*arguments):
    raise AssertionError("network access")
socket.socket.connect = socket.getaddrinfo = fail
sys.modules["torch"] = None
import numpy as np, snax
model = snax.load("mini_16khz")
codes = model.encode(np.zeros((1, 1, 16_000), np.float32))
print(*[level.shape for level in codes], model.decode(codes).shape)
"""


def test_needs_neither_network_nor_torch() -> None:
    process = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert process.stdout == "(1, 25) (1, 50) (1, 100) (1, 1, 16000)\n", process.stderr


def test_size_and_model_card() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 6_000_000
    card = " ".join((FOLDER / "README.md").read_text().split())
    for text in (
        "CC-BY-SA-3.0",
        "Allison Smith",
        "Carlo Flora",
        "Maxim Topal",
        "Nickolay V. Shmyrev",
        "recipes/mini_16khz.toml",
        "recipes/mini_16khz_2.toml",
        "curves.png",
    ):
        assert text in card
    recipe = read(Path(__file__).parents[1] / "recipes" / "mini_16khz.toml")
    assert recipe.model == snax.load("mini_16khz").config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["held_out.flac", "other_speaker.flac"])
def test_speech_quality(name: str) -> None:
    """Speech is intelligible and better than with random weights, for prompts, a speaker and a language that are not in
    the training data. A STOI of 0.88 was the goal of its training."""
    model = snax.load("mini_16khz")
    target, _ = soundfile.read(Path(__file__).parent / "prompts" / name, dtype="float32")
    trained, untrained = (
        metrics.scores(reconstruct(codec, target), target, 16_000, with_pesq=True)
        for codec in (model, snax.SNAC(model.config, rngs=nnx.Rngs(0)))
    )
    assert trained["stoi"] >= 0.88
    for metric in ("mel", "stft"):
        assert trained[metric] < untrained[metric]
    for metric in ("stoi", "pesq", "si_sdr"):
        assert trained[metric] > untrained[metric]


def reconstruct(model: snax.SNAC, samples: np.ndarray) -> np.ndarray:
    (reconstruction,) = snax.decode_many(model, snax.encode_many(model, [samples]))
    return reconstruction
