"""The examples run and say what they show, with a small model in the place of the published one."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import small

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = {"corpus": small.model(dataclasses.replace(small.CONFIG, codebook_size=4096))}  # for Orpheus' ids
SHOWN = {
    "corpus": [
        "tokens/tokens-00000-of-00001.parquet",
        "(2, 512) [128257, ",
        "guit_em9.flac",
        "ambi_piano.flac: ",
        " ids -> 2.81 s",
    ],
    "batch": ["guit_em9.flac", "speech_7s.wav", "decoded to 113600 samples"],
    "language_model": ["Orpheus' ids:     [128257, ", "<custom_token_", "s; 4 wait for their group"],
    "long_file": ["600 s of audio", "x real time"],
    "stream": ["frame 0: 0 samples to be heard", "largest difference from decoding all at once: "],
}


@pytest.mark.parametrize("name", SHOWN)
def test_example(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [name])
    example = importlib.import_module(name)
    monkeypatch.setattr(example, "load", lambda: (MODELS.get(name, small.model()), False))
    example.main()
    out = capsys.readouterr().out
    for line in SHOWN[name]:
        assert line in out
    if name == "stream":
        assert float(out.rsplit(": ")[-1]) < 1e-5
