"""The examples run and say what they show, with a small model in the place of the published one."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
from helpers import recordings, small

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
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
