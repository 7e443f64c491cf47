"""Marked `corpus`: more than 500 real clips of speech and music, fetched from Debian's and npm's archives."""

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
from test_published import drawn

import snax
from snax.data import audio

pytestmark = pytest.mark.corpus

# What becomes of one prompt after the other: suffix, sampling rate and soundfile's arguments.
RECODED = [
    ("wav", 16_000, {}),
    ("mp3", 24_000, {}),
    ("ogg", 24_000, {"subtype": "VORBIS"}),
    ("opus", 48_000, {"format": "OGG", "subtype": "OPUS"}),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder of 206 samples of music, one clip in many formats and read speech; 300 prompts of a phone system in four
    formats and three rates, in a folder, a tar and a table."""
    folder = tmp_path_factory.mktemp("real")
    music = archives.npm("supersonic-scsynth-samples@0.84.2", folder)
    formats = archives.npm("audio-lena@3.0.1", folder)
    speech = archives.debian("pocketsphinx-testdata", folder)
    prompts = archives.debian("asterisk-core-sounds-en-g722", folder)
    recoded: dict[str, bytes] = {}
    for i, path in enumerate(sorted(prompts.rglob("*.g722"))[:300]):
        suffix, rate, how = RECODED[i % len(RECODED)]
        with av.open(str(path), format="g722") as container:
            pcm = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
        target = folder / f"prompt_{i:03}.{suffix}"
        soundfile.write(target, soxr.resample(pcm.astype(np.float32) / 2**15, 16_000, rate), rate, **how)
        recoded[target.name] = target.read_bytes()
        target.unlink()
    parts = [dict(list(recoded.items())[i::3]) for i in range(3)]
    return [
        music,
        formats,
        speech,
        corpora.folder(folder / "prompts", parts[0]),
        corpora.tar(folder / "prompts.tar", parts[1]),
        corpora.table(folder / "prompts.parquet", parts[2]),
    ]


def test_every_token_of_every_clip(inputs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch_model, model = drawn("snac_24khz")
    snax.save(model, tmp_path / "model")
    jobs.finish(jobs.start(inputs, tmp_path / "out", tmp_path / "model", clips_per_shard=100))
    for processes, devices in ((2, 1), (1, 3)):
        other = tmp_path / f"{processes} processes, {devices} devices"
        jobs.finish(jobs.start(inputs, other, tmp_path / "model", processes, devices, clips_per_shard=100))
        assert jobs.hashes(other) == jobs.hashes(tmp_path / "out")

    source = snax.open_tokens(tmp_path / "out")
    bad = [json.loads(line) for line in (tmp_path / "out" / "_quarantine.jsonl").read_text().splitlines()]
    prompts = corpora.contents(inputs[4]) | corpora.contents(inputs[5])
    kinds, tokens, differing = Counter[str](), 0, 0
    for row in source:
        content = row["source"] if row["member"] is None else prompts[row["id"]]
        heard = audio.read(content, model.config.sampling_rate)[0]
        expected = torch_encode(torch_model, heard, model.config.pad_multiple)
        kinds[Path(row["source"]).suffix] += 1
        tokens += sum(map(len, expected))
        if any((ours != theirs).any() for ours, theirs in zip(row["codes"], expected, strict=True)):
            differing += sum(int((ours != theirs).sum()) for ours, theirs in zip(row["codes"], expected, strict=True))
            assert_same_codes(torch_model, np.pad(heard, (0, -len(heard) % model.config.pad_multiple)), row["codes"])
    with capsys.disabled():
        print(f"\n{len(source)} clips, {dict(kinds)}; {tokens} tokens, {differing} of them ties that fell otherwise")
        print(f"in quarantine: {[(clip['id'], clip['reason']) for clip in bad]}")
    assert len(source) >= 500
    assert len(source) + len(bad) == source_count(inputs)


def source_count(inputs: list[Path]) -> int:
    files = [path for folder in inputs[:4] for path in folder.rglob("*") if path.suffix.lower() in audio.SUFFIXES]
    return len(files) + 200
