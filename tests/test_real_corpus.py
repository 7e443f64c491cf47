"""Extraction of more than 500 real clips from the Debian and npm archives. Run with `pytest -m corpus`."""

import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from helpers import archives, corpora, jobs
from helpers.pairs import torch_encode
from helpers.reference import assert_same_codes
from test_published import random_pair

import snax
from snax.data import audio

pytestmark = pytest.mark.corpus

# The formats that prompts are converted to in turn: suffix, sampling rate, and soundfile's arguments.
PROMPT_FORMATS = [
    ("wav", 16_000, {}),
    ("mp3", 24_000, {}),
    ("ogg", 24_000, {"subtype": "VORBIS"}),
    ("opus", 48_000, {"format": "OGG", "subtype": "OPUS"}),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Download 206 music samples, one clip in many formats, read speech, and 300 phone prompts.

    The prompts are converted to four formats with three sampling rates, and written to a folder, a tar and a table.
    """
    folder = tmp_path_factory.mktemp("real")
    music = archives.npm("supersonic-scsynth-samples@0.84.2", folder)
    formats = archives.npm("audio-lena@3.0.1", folder)
    speech = archives.debian("pocketsphinx-testdata", folder)
    prompts = archives.debian("asterisk-core-sounds-en-g722", folder)
    converted: dict[str, bytes] = {}
    for i, path in enumerate(sorted(prompts.rglob("*.g722"))[:300]):
        suffix, rate, options = PROMPT_FORMATS[i % len(PROMPT_FORMATS)]
        with av.open(str(path), format="g722") as container:
            pcm = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        target = folder / f"prompt_{i:03}.{suffix}"
        soundfile.write(target, soxr.resample(pcm.astype(np.float32) / 2**15, 16_000, rate), rate, **options)
        converted[target.name] = target.read_bytes()
        target.unlink()
    parts = [dict(list(converted.items())[i::3]) for i in range(3)]
    return [
        music,
        formats,
        speech,
        corpora.folder(folder / "prompts", parts[0]),
        corpora.tar(folder / "prompts.tar", parts[1]),
        corpora.table(folder / "prompts.parquet", parts[2]),
    ]


def test_every_token_of_every_clip(inputs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch_model, model = random_pair("snac_24khz")
    snax.save(model, tmp_path / "model")
    jobs.finish(jobs.start(inputs, tmp_path / "out", tmp_path / "model", clips_per_shard=100))
    for processes, devices in ((2, 1), (1, 3)):
        other = tmp_path / f"{processes} processes, {devices} devices"
        jobs.finish(jobs.start(inputs, other, tmp_path / "model", processes, devices, clips_per_shard=100))
        assert jobs.hashes(other) == jobs.hashes(tmp_path / "out")

    source = snax.open_tokens(tmp_path / "out")
    quarantined = [json.loads(line) for line in (tmp_path / "out" / "_quarantine.jsonl").read_text().splitlines()]
    prompts = corpora.contents(inputs[4]) | corpora.contents(inputs[5])
    suffixes, tokens, differing = Counter[str](), 0, 0
    for row in source:
        content = row["source"] if row["member"] is None else prompts[row["id"]]
        samples = audio.read(content, model.config.sampling_rate)[0]
        expected = torch_encode(torch_model, samples, model.config.pad_multiple)
        suffixes[Path(row["source"]).suffix] += 1
        tokens += sum(map(len, expected))
        different = sum(int((codes != other).sum()) for codes, other in zip(row["codes"], expected, strict=True))
        if different:
            differing += different
            padded = np.pad(samples, (0, -len(samples) % model.config.pad_multiple))
            assert_same_codes(torch_model, padded, row["codes"])
    with capsys.disabled():
        print(f"\n{len(source)} clips, {dict(suffixes)}; {tokens} tokens, {differing} differ because of ties")
        print(f"in quarantine: {[(clip['id'], clip['reason']) for clip in quarantined]}")
    assert len(source) >= 500
    assert len(source) + len(quarantined) == clip_count(inputs)


def clip_count(inputs: list[Path]) -> int:
    files = [path for folder in inputs[:4] for path in folder.rglob("*") if path.suffix.lower() in audio.SUFFIXES]
    return len(files) + 200
