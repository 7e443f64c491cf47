"""The examples run and say what they show, with a small model in the place of the published one."""

import dataclasses
import importlib
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from helpers import recordings, small

from snax.tokens import TokenLayout

pytestmark = pytest.mark.slow

EXAMPLES, PROMPTS = Path(__file__).parents[1] / "examples", Path(__file__).with_name("prompts")
# What an example is told on its command line.
ARGUMENTS = {"finetune": [str(recordings.DATA)]}
MODELS = {"corpus": small.model(dataclasses.replace(small.CONFIG, codebook_size=4096))}  # for Orpheus' ids
SHOWN = {
    "corpus": [
        "tokens/tokens-00000-of-00001.parquet",
        "(2, 512) [128257, ",
        "guit_em9.flac",
        "ambi_piano.flac: ",
        " ids -> 2.81 s",
    ],
    "finetune": ["1 held-out clips", "mel distance   before", "longest clip: finetuned/finetuned.png"],
    "batch": ["guit_em9.flac", "speech_7s.wav", "decoded to 113600 samples"],
    "language_model": ["Orpheus ids:       [128257, ", "<custom_token_", " s, 4 tokens of an incomplete group"],
    "long_file": ["600 s of audio", "x real time"],
    "cluster": ["killed a node: ", "a node joined: 20 of 20 shards are complete", "process: the same bytes"],
    "stream": ["frame 0: 0 samples", "largest difference from decoding all codes at once: "],
}


@pytest.mark.usefixtures("optax_mixes")
@pytest.mark.parametrize("name", SHOWN)
def test_example(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if name == "cluster":
        request.getfixturevalue("one_ray_cluster")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, [])])
    example = importlib.import_module(name)
    if name == "finetune":  # the model that comes with snax, and the fewest steps
        monkeypatch.setattr(example, "STEPS", 2)
    elif name != "cluster":  # which has processes of its own
        monkeypatch.setattr(example, "load", lambda: (MODELS.get(name, small.model()), "small"))
    example.main()
    out = capsys.readouterr().out
    for line in SHOWN[name]:
        assert line in out
    if name == "stream":
        assert float(out.rsplit(": ")[-1]) < 1e-5


@pytest.fixture
def speech_lm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example with a small transformer."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("speech_lm")
    sizes = {"STEPS": 20, "EVAL_EVERY": 10, "DIM": 32, "LAYERS": 2, "LENGTH": 56, "WINDOW": 20, "SECONDS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(example, name, value)
    return example


@pytest.mark.usefixtures("optax_mixes")
def test_speech_lm(
    speech_lm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model learns: clips that it was not trained on are more likely than chance. The speech has its length."""
    clips = [str(PROMPTS / f"{name}.flac") for name in ("other_speaker", "held_out")]
    monkeypatch.setattr(sys, "argv", ["speech_lm", *clips, str(tmp_path)])
    speech_lm.main()
    out = capsys.readouterr().out
    uniform, unigram, bigram = map(float, re.findall(r"(?:uniform|unigram|bigram) ([\d.]+)", out))
    training, held_out = (
        [float(loss) for loss in re.findall(rf"{part} loss ([\d.]+)", out)] for part in ("training", "held-out")
    )
    assert uniform == pytest.approx(math.log(4096), abs=1e-3)
    assert bigram < unigram < uniform
    assert len(training) == len(held_out) == 2
    assert training[-1] < unigram
    assert held_out[-1] < uniform
    speech = soundfile.info(tmp_path / "speech.wav")
    assert (speech.duration, speech.samplerate) == (2, 16_000)
    assert (tmp_path / "losses.png").exists()


def test_speech_lm_cache(speech_lm: ModuleType) -> None:
    """With the cache, also when it is full, each token gets the logits that it gets in the whole sequence."""
    model = speech_lm.SpeechLM(small.model(), TokenLayout((4, 2, 1), 64), nnx.Rngs(0))
    inputs = np.random.default_rng(0).integers(64, size=(1, 56), dtype=np.int32)
    inputs[0, 0] = speech_lm.START
    whole, _ = jax.jit(type(model).__call__)(model, inputs)
    step, cache = jax.jit(type(model).__call__), model.init_cache()
    for i in range(inputs.shape[1]):
        logits, cache = step(model, inputs[:, i : i + 1], jnp.int32(i), cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, i], atol=1e-5)
