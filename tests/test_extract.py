"""Extraction of corpora in every input format: codes equal the reference, and every clip is accounted for."""

import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from helpers import corpora, small
from helpers.pairs import pair
from helpers.reference import assert_same_codes

import snax
from snax.data import audio
from snax.data.corpus import CorpusError
from snax.extract import worker
from snax.extract.config import ExtractConfig
from snax.extract.run import extract
from snax.extract.store import StoreError
from snax.tokens import ORPHEUS, token_layout

CLIPS = corpora.clips(12)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return corpora.folder(tmp_path / "corpus", CLIPS)


def extract_config(out: Path, *inputs: Path, **options: Any) -> ExtractConfig:
    options = {"clips_per_shard": 5, "num_decoders": 2} | options
    return ExtractConfig([str(path) for path in inputs], out=str(out), model="small", **options)


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("tokens-*.parquet")) for row in pq.read_table(path).to_pylist()]


def contents(out: Path) -> dict[str, bytes]:
    """Return the content of all files, including hidden ones."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def shards(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if name.endswith(".parquet")}


def quarantined(out: Path) -> dict[str, str]:
    lines = (out / "_quarantine.jsonl").read_text().splitlines()
    return {clip["id"]: clip["reason"] for clip in map(json.loads, lines)}


@pytest.fixture
def uninterrupted(corpus: Path, tmp_path: Path) -> Path:
    extract(small.model(), extract_config(tmp_path / "uninterrupted", corpus))
    return tmp_path / "uninterrupted"


def test_codes_of_mixed_inputs_equal_reference(tmp_path: Path) -> None:
    torch_model, model, _ = pair("decoder with other rates")
    parts = [corpora.clips(12, seed) for seed in range(5)]
    inputs = [
        corpora.folder(tmp_path / "files", parts[0]),
        corpora.tar(tmp_path / "a.tar", parts[1]),
        corpora.table(tmp_path / "b.parquet", parts[2], ids=False),
        corpora.manifest(tmp_path / "c.jsonl", {f"j{name}": content for name, content in parts[3].items()}),
        corpora.manifest(tmp_path / "d.csv", {f"c{name}": content for name, content in parts[4].items()}),
    ]
    summary = extract(model, extract_config(tmp_path / "out", *inputs))
    expected = {
        **{("below/" if i % 3 == 0 else "") + name: content for i, (name, content) in enumerate(parts[0].items())},
        **{Path(name).stem: content for name, content in parts[1].items()},
        **{f"b/{i}": content for i, content in enumerate(parts[2].values())},
        **{f"j{Path(name).stem}": content for name, content in parts[3].items()},
        **{f"c{Path(name).stem}": content for name, content in parts[4].items()},
    }
    extracted = rows(tmp_path / "out")
    assert sorted(row["id"] for row in extracted) == sorted(expected)
    assert quarantined(tmp_path / "out") == {}
    used_codes = [set() for _ in model.config.vq_strides]
    for row in extracted:
        samples = audio.read(io.BytesIO(expected[row["id"]]), model.config.sampling_rate)[0]
        assert (row["num_samples"], row["sample_rate"]) == (len(samples), model.config.sampling_rate)
        codes = [np.array(row[f"codes_{level}"]) for level in range(3)]
        padded = np.pad(samples, (0, -len(samples) % model.config.pad_multiple))
        assert_same_codes(torch_model, padded, codes)
        for level, used in zip(codes, used_codes, strict=True):
            used |= set(level.tolist())
    assert all(len(used) > 100 for used in used_codes), "too few distinct codes for a meaningful comparison"
    totals = summary["total"]
    assert (totals["clips"], totals["committed"], totals["rows"], totals["quarantined"]) == (60, 60, 60, 0)
    assert totals["tokens"] == sum(len(row[f"codes_{level}"]) for row in extracted for level in range(3))
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text()) == totals


def test_separate_channels(tmp_path: Path) -> None:
    name, content = "a.flac", corpora.encoded("a.flac", 1, channels=2)
    corpora.folder(tmp_path / "corpus", {name: content})
    summary = extract(small.model(), extract_config(tmp_path / "out", tmp_path / "corpus", channels="separate"))
    assert (summary["total"]["committed"], summary["total"]["rows"]) == (1, 2)
    channels = audio.read(io.BytesIO(content), small.CONFIG.sampling_rate, separate=True)
    encoded = snax.encode_many(small.model(), channels)
    for channel, (row, (codes, _)) in enumerate(zip(rows(tmp_path / "out"), encoded, strict=True)):
        assert (row["id"], row["channel"]) == (f"below/{name}", channel)
        np.testing.assert_array_equal(row["codes_2"], codes[2])


@pytest.mark.parametrize("name", ["shared", "separate"])
def test_tokens_column_unflattens_to_codes(name: str, corpus: Path, tmp_path: Path) -> None:
    extract(small.model(), extract_config(tmp_path / "out", corpus, tokens=name))
    layout = token_layout(name, small.CONFIG)
    for row in rows(tmp_path / "out"):
        tokens = np.array([row["tokens"]], np.int32)
        assert tokens.max() < 64 * (7 if name == "separate" else 1)
        for level, codes in enumerate(layout.unflatten(tokens)):
            np.testing.assert_array_equal(codes[0], row[f"codes_{level}"])


def test_rejects_orpheus_tokens_for_other_codecs(corpus: Path, tmp_path: Path) -> None:
    assert token_layout("orpheus", snax.codec.config.PUBLISHED_CONFIGS["snac_24khz"]) == ORPHEUS
    with pytest.raises(ValueError, match=r"this model has \(4, 2, 1\) and 64"):
        extract(small.model(), extract_config(tmp_path / "out", corpus, tokens="orpheus"))
    assert not (tmp_path / "out").exists()


def test_rejects_codebooks_beyond_16_bits(corpus: Path, tmp_path: Path) -> None:
    large = small.model(dataclasses.replace(small.CONFIG, codebook_size=2**16 + 1))
    with pytest.raises(ValueError, match=r"`codebook_size` \(=65537\) must be at most 65536"):
        extract(large, extract_config(tmp_path / "out", corpus))
    assert not (tmp_path / "out").exists()


def test_finished_run_writes_nothing(corpus: Path, uninterrupted: Path) -> None:
    def times_and_inodes() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in uninterrupted.rglob("*")}

    before = times_and_inodes()
    summary = extract(small.model(), extract_config(uninterrupted, corpus))
    assert times_and_inodes() == before
    assert (summary["shards"], summary["total"]["clips"]) == (0, 12)


DAMAGES = {
    "flipped bit in a shard": lambda out: flip(out / "tokens-00001-of-00003.parquet"),
    "missing shard": lambda out: (out / "tokens-00001-of-00003.parquet").unlink(),
    "missing sidecar": lambda out: (out / "_snax" / "00001.json").unlink(),
    "truncated sidecar": lambda out: os.truncate(out / "_snax" / "00001.json", 100),
    "another shard's sidecar": lambda out: (out / "_snax" / "00001.json").write_bytes(
        (out / "_snax" / "00002.json").read_bytes()
    ),
    "truncated plan": lambda out: os.truncate(out / "_snax" / "plan.parquet", 100),
    "missing plan": lambda out: (out / "_snax" / "plan.parquet").unlink(),
    "missing _SUCCESS": lambda out: (out / "_SUCCESS").unlink(),
    "truncated _SUCCESS": lambda out: os.truncate(out / "_SUCCESS", 10),
    "temporary files of a killed process": lambda out: [
        (folder / ".snax-0123456789abcdef.tmp").write_bytes(b"half") for folder in (out, out / "_snax")
    ],
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_repairs_damage(damage: str, corpus: Path, uninterrupted: Path) -> None:
    before = contents(uninterrupted)
    DAMAGES[damage](uninterrupted)
    assert contents(uninterrupted) != before
    summary = extract(small.model(), extract_config(uninterrupted, corpus))
    assert shards(uninterrupted) == {name: content for name, content in before.items() if name.endswith(".parquet")}
    assert contents(uninterrupted).keys() == before.keys()
    assert summary["shards"] <= 1, "intact shards must not be made again"


def test_resumes_run_killed_during_first_write(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """The directory holds only a temporary file. Its name looks like a glob pattern."""
    out = tmp_path / "out [1*]"
    (out / "_snax").mkdir(parents=True)
    (out / "_snax" / ".snax-0123456789abcdef.tmp").write_bytes(b"half")
    for _ in range(2):
        extract(small.model(), extract_config(out, corpus))
        assert contents(out).keys() == contents(uninterrupted).keys()
        assert shards(out) == shards(uninterrupted)


def test_rejects_truncated_job_file(corpus: Path, uninterrupted: Path) -> None:
    os.truncate(uninterrupted / "_snax" / "job.json", 50)
    with pytest.raises(StoreError, match="job.json is corrupt"):
        extract(small.model(), extract_config(uninterrupted, corpus))


CHANGES = {
    "fingerprint": {"model": snax.SNAC(small.CONFIG, rngs=snax.codec.model.nnx.Rngs(1))},
    "channels": {"channels": "separate"},
    "tokens": {"tokens": "shared"},
    "max_seconds": {"max_seconds": 10.0},
    "plan": {"clips_per_shard": 4},
}


@pytest.mark.parametrize("key", CHANGES)
def test_rejects_output_of_another_job(key: str, corpus: Path, uninterrupted: Path) -> None:
    before = contents(uninterrupted)
    options = dict(CHANGES[key])
    model = options.pop("model", small.model())
    with pytest.raises(StoreError, match=f"other inputs or settings.*\n  {key}: .*, now ") as error:
        extract(model, extract_config(uninterrupted, corpus, **options))
    assert str(error.value).count(", now ") == 1
    assert contents(uninterrupted) == before


def test_rejects_output_of_another_version(corpus: Path, uninterrupted: Path) -> None:
    with (
        mock.patch.object(worker.importlib.metadata, "version", return_value="9"),
        pytest.raises(StoreError, match="snax: "),
    ):
        extract(small.model(), extract_config(uninterrupted, corpus))


def test_rejects_added_clips(corpus: Path, uninterrupted: Path) -> None:
    (corpus / "new.wav").write_bytes(CLIPS["000_16.wav"])
    with pytest.raises(StoreError, match="plan: "):
        extract(small.model(), extract_config(uninterrupted, corpus))


def test_rejects_directory_with_unrelated_files(corpus: Path, tmp_path: Path) -> None:
    before = contents(corpus)
    with pytest.raises(StoreError, match="files that do not belong to an extraction"):
        extract(small.model(), extract_config(corpus, corpus))
    assert contents(corpus) == before


@pytest.mark.parametrize("call", ["write_bytes", "replace"])
@pytest.mark.parametrize("number", [1, 3, 4, 5, 9])
def test_full_disk(call: str, number: int, corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    original, calls = getattr(Path, call), []

    def failing(self: Path, *arguments: Any) -> Any:
        calls.append(self)
        if len(calls) < number:
            return original(self, *arguments)
        if call == "write_bytes":
            original(self, arguments[0][: len(arguments[0]) // 2])
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with mock.patch.object(Path, call, failing), pytest.raises(OSError, match="No space left"):
        extract(small.model(), extract_config(out, corpus))
    assert not (out / "_SUCCESS").exists()
    assert not list(out.rglob(".snax-*"))
    extract(small.model(), extract_config(out, corpus))
    assert shards(out) == shards(uninterrupted)


def corrupt_files() -> Iterator[tuple[str, bytes, str]]:
    """Yield corrupt audio files: name, content, and the expected reasons. An empty reason allows either outcome."""
    rng = np.random.default_rng(0)
    for name, content in ((f"m_{suffix}", corpora.encoded(suffix, 1)) for suffix in corpora.FORMATS):
        stem, _, suffix = name.rpartition(".")
        yield f"{stem}_half.{suffix}", content[: len(content) // 2], "truncated|cannot be decoded|not an audio file"
        yield f"{stem}_nothing.{suffix}", b"", "not an audio file"
        yield f"{stem}_random.{suffix}", rng.bytes(5000), "not an audio file"
        yield f"{stem}_zeros.{suffix}", bytes(5000), "not an audio file"
        yield f"{stem}_head.{suffix}", rng.bytes(64) + content[64:], ""
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(60 * 8000), 8000, format="FLAC")
    yield "bomb.flac", silence.getvalue(), "longer than 30 seconds"
    yield "text.wav", b"RIFF, he said, was a place in Morocco.", "not an audio file"


def test_corrupt_clips_go_into_quarantine(tmp_path: Path, corpus: Path, uninterrupted: Path) -> None:
    corrupted = {name: (content, reason) for name, content, reason in corrupt_files()}
    for name, (content, _) in corrupted.items():
        (corpus / name).write_bytes(content)
    (corpus / "folder.wav").mkdir()
    (corpus / "gone.wav").symlink_to(corpus / "nowhere.wav")
    flac = corpora.encoded("a.flac", 1)
    (corpus / "really_flac.mp3").write_bytes(flac)  # readable, because the content determines the format
    out = tmp_path / "out"
    summary = extract(
        small.model(), extract_config(out, corpus, max_seconds=30.0, max_quarantined=0.9, clips_per_shard=10)
    )
    extracted, reasons = {row["id"]: row for row in rows(out)}, quarantined(out)
    for name, (_, reason) in corrupted.items():
        if reason:
            assert any(part in reasons[name] for part in reason.split("|")), f"{name}: {reasons[name]}"
        else:  # some formats can be decoded without parts of their header
            assert (name in reasons) != (name in extracted)
    assert (
        summary["total"]["clips"] == len(extracted) + len(reasons) == 12 + len(corrupted) + 1 + ("gone.wav" in reasons)
    )
    expected = {row["id"]: row for row in rows(uninterrupted)}
    for name in expected:
        assert extracted[name] == expected[name], "corrupt clips must not change the codes of others"
    samples = audio.read(io.BytesIO(flac), small.CONFIG.sampling_rate)
    np.testing.assert_array_equal(extracted["really_flac.mp3"]["codes_0"], small.model().encode(samples[None])[0][0])


def test_read_error_stops_the_run(corpus: Path, tmp_path: Path) -> None:
    with (corpus / "unreadable.jsonl").open("w") as file:
        file.write('{"path": "/proc/self/mem"}\n')
    with pytest.raises(OSError, match="/proc/self/mem cannot be read: OSError"):
        extract(small.model(), extract_config(tmp_path / "out", corpus / "unreadable.jsonl"))


def test_too_many_unreadable_clips_stop_the_run(tmp_path: Path) -> None:
    clips = corpora.clips(30)
    clips |= {f"bad_{i}.wav": b"bad" for i in range(12)}
    corpus = corpora.folder(tmp_path / "corpus", clips)
    with pytest.raises(
        worker.TooManyUnreadableError, match=r"12 of 42 clips cannot be read, more than `max_quarantined` \(=10%\)"
    ):
        extract(small.model(), extract_config(tmp_path / "out", corpus, clips_per_shard=100))
    assert not list((tmp_path / "out").glob("tokens-*"))
    summary = extract(small.model(), extract_config(tmp_path / "out", corpus, clips_per_shard=100, max_quarantined=0.5))
    assert (summary["total"]["committed"], summary["total"]["quarantined"]) == (30, 12)


def test_retry_quarantined(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    clip = next(corpus.glob("*_a.mp3"))
    content = clip.read_bytes()
    clip.write_bytes(bytes(len(content)))  # the size must not change, because it is part of the plan
    out = tmp_path / "out"
    extract(small.model(), extract_config(out, corpus))
    assert quarantined(out).keys() == {clip.name}
    clip.write_bytes(content)
    assert extract(small.model(), extract_config(out, corpus))["shards"] == 0
    summary = extract(small.model(), extract_config(out, corpus, retry_quarantined=True))
    assert (summary["shards"], summary["total"]["quarantined"]) == (1, 0)
    assert shards(out) == shards(uninterrupted)


def test_rejects_empty_inputs(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"found no clips in .*nothing \(0 files examined\)"):
        extract(small.model(), extract_config(tmp_path / "out", tmp_path / "nothing"))


def test_object_store(corpus: Path, uninterrupted: Path) -> None:
    memory = fsspec.filesystem("memory")
    url = "memory://bucket/out"
    extract(small.model(), ExtractConfig([str(corpus)], out=url, model="small", clips_per_shard=5, num_decoders=2))
    stored = {path.rpartition("/")[2]: memory.cat_file(path) for path in memory.glob("/bucket/out/tokens-*")}
    assert stored == {name: content for name, content in shards(uninterrupted).items() if name.startswith("tokens")}
    assert len(snax.open_tokens(url)) == 12
