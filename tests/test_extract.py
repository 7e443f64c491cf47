"""A corpus in all its forms to shards of tokens: the reference's for each clip, and every clip accounted for."""

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
from snax.extract import run
from snax.extract.run import ExtractConfig, extract
from snax.extract.store import StoreError
from snax.extract.table import token_layout
from snax.tokens import ORPHEUS

CLIPS = corpora.clips(12)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return corpora.folder(tmp_path / "corpus", CLIPS)


def job(out: Path, *inputs: Path, **how: Any) -> ExtractConfig:
    how = {"clips_per_shard": 5, "num_workers": 2} | how
    return ExtractConfig([str(path) for path in inputs], str(out), "small", **how)


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("tokens-*.parquet")) for row in pq.read_table(path).to_pylist()]


def contents(out: Path) -> dict[str, bytes]:
    """What is in all files, hidden ones too."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def shards(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if name.endswith(".parquet")}


def quarantined(out: Path) -> dict[str, str]:
    lines = (out / "_quarantine.jsonl").read_text().splitlines()
    return {clip["id"]: clip["reason"] for clip in map(json.loads, lines)}


@pytest.fixture
def undisturbed(corpus: Path, tmp_path: Path) -> Path:
    extract(small.model(), job(tmp_path / "undisturbed", corpus))
    return tmp_path / "undisturbed"


def test_a_mixed_corpus(tmp_path: Path) -> None:
    torch_model, model, _ = pair("decoder with other rates")
    parts = [corpora.clips(12, seed) for seed in range(5)]
    inputs = [
        corpora.folder(tmp_path / "files", parts[0]),
        corpora.tar(tmp_path / "a.tar", parts[1]),
        corpora.table(tmp_path / "b.parquet", parts[2], ids=False),
        corpora.manifest(tmp_path / "c.jsonl", {f"j{name}": content for name, content in parts[3].items()}),
        corpora.manifest(tmp_path / "d.csv", {f"c{name}": content for name, content in parts[4].items()}),
    ]
    end = extract(model, job(tmp_path / "out", *inputs))
    expected = {
        **{("below/" if i % 3 == 0 else "") + name: content for i, (name, content) in enumerate(parts[0].items())},
        **{Path(name).stem: content for name, content in parts[1].items()},
        **{f"b/{i}": content for i, content in enumerate(parts[2].values())},
        **{f"j{Path(name).stem}": content for name, content in parts[3].items()},
        **{f"c{Path(name).stem}": content for name, content in parts[4].items()},
    }
    found = rows(tmp_path / "out")
    assert sorted(row["id"] for row in found) == sorted(expected)
    assert quarantined(tmp_path / "out") == {}
    used = [set() for _ in model.config.vq_strides]
    for row in found:
        heard = audio.read(io.BytesIO(expected[row["id"]]), model.config.sampling_rate)[0]
        assert (row["num_samples"], row["sample_rate"]) == (len(heard), model.config.sampling_rate)
        codes = [np.array(row[f"codes_{level}"]) for level in range(3)]
        padded = np.pad(heard, (0, -len(heard) % model.config.pad_multiple))
        assert_same_codes(torch_model, padded, codes)
        for level, seen in zip(codes, used, strict=True):
            seen |= set(level.tolist())
    assert all(len(codes) > 100 for codes in used), "the tokens say little"
    totals = end["total"]
    assert (totals["clips"], totals["committed"], totals["rows"], totals["quarantined"]) == (60, 60, 60, 0)
    assert totals["tokens"] == sum(len(row[f"codes_{level}"]) for row in found for level in range(3))
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text()) == totals


def test_channels_one_by_one(tmp_path: Path) -> None:
    name, content = "a.flac", corpora.encoded("a.flac", 1, channels=2)
    corpora.folder(tmp_path / "corpus", {name: content})
    end = extract(small.model(), job(tmp_path / "out", tmp_path / "corpus", separate=True))
    assert (end["total"]["committed"], end["total"]["rows"]) == (1, 2)
    channels = audio.read(io.BytesIO(content), small.CONFIG.sampling_rate, separate=True)
    encoded = snax.encode_many(small.model(), channels)
    for channel, (row, (codes, _)) in enumerate(zip(rows(tmp_path / "out"), encoded, strict=True)):
        assert (row["id"], row["channel"]) == (f"below/{name}", channel)
        np.testing.assert_array_equal(row["codes_2"], codes[2])


@pytest.mark.parametrize("name", ["shared", "separate"])
def test_tokens_of_a_language_model(name: str, corpus: Path, tmp_path: Path) -> None:
    extract(small.model(), job(tmp_path / "out", corpus, tokens=name))
    layout = token_layout(name, small.CONFIG)
    for row in rows(tmp_path / "out"):
        tokens = np.array([row["tokens"]], np.int32)
        assert tokens.max() < 64 * (7 if name == "separate" else 1)
        for level, codes in enumerate(layout.unflatten(tokens)):
            np.testing.assert_array_equal(codes[0], row[f"codes_{level}"])


def test_orpheus_tokens_are_for_its_codec(corpus: Path, tmp_path: Path) -> None:
    assert token_layout("orpheus", snax.codec.config.PUBLISHED_CONFIGS["snac_24khz"]) == ORPHEUS
    with pytest.raises(ValueError, match="this model has (4, 2, 1) and 64".replace("(", r"\(").replace(")", r"\)")):
        extract(small.model(), job(tmp_path / "out", corpus, tokens="orpheus"))
    assert not (tmp_path / "out").exists()


def test_codes_that_do_not_fit(corpus: Path, tmp_path: Path) -> None:
    large = small.model(dataclasses.replace(small.CONFIG, codebook_size=2**16 + 1))
    with pytest.raises(ValueError, match="16 bits; this model has 65537"):
        extract(large, job(tmp_path / "out", corpus))
    assert not (tmp_path / "out").exists()


def test_a_finished_run_writes_nothing(corpus: Path, undisturbed: Path) -> None:
    def written() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in undisturbed.rglob("*")}

    before = written()
    end = extract(small.model(), job(undisturbed, corpus))
    assert written() == before
    assert (end["shards"], end["total"]["clips"]) == (0, 12)


DAMAGES = {
    "a flipped bit in a shard": lambda out: flip(out / "tokens-00001-of-00003.parquet"),
    "no shard": lambda out: (out / "tokens-00001-of-00003.parquet").unlink(),
    "no sidecar": lambda out: (out / "_snax" / "00001.json").unlink(),
    "half a sidecar": lambda out: os.truncate(out / "_snax" / "00001.json", 100),
    "another shard's sidecar": lambda out: (out / "_snax" / "00001.json").write_bytes(
        (out / "_snax" / "00002.json").read_bytes()
    ),
    "half a plan": lambda out: os.truncate(out / "_snax" / "plan.parquet", 100),
    "no plan": lambda out: (out / "_snax" / "plan.parquet").unlink(),
    "no _SUCCESS": lambda out: (out / "_SUCCESS").unlink(),
    "half a _SUCCESS": lambda out: os.truncate(out / "_SUCCESS", 10),
    "what a killed process left": lambda out: [
        (folder / ".snax-0123456789abcdef.tmp").write_bytes(b"half") for folder in (out, out / "_snax")
    ],
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_mended(damage: str, corpus: Path, undisturbed: Path) -> None:
    before = contents(undisturbed)
    DAMAGES[damage](undisturbed)
    assert contents(undisturbed) != before
    end = extract(small.model(), job(undisturbed, corpus))
    assert shards(undisturbed) == {name: content for name, content in before.items() if name.endswith(".parquet")}
    assert contents(undisturbed).keys() == before.keys()
    assert end["shards"] <= 1, "what was whole was left alone"


def test_killed_before_anything_is_said(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Nothing but half a file is there; in a folder whose name looks like a pattern."""
    out = tmp_path / "out [1*]"
    (out / "_snax").mkdir(parents=True)
    (out / "_snax" / ".snax-0123456789abcdef.tmp").write_bytes(b"half")
    for _ in range(2):
        extract(small.model(), job(out, corpus))
        assert contents(out).keys() == contents(undisturbed).keys()
        assert shards(out) == shards(undisturbed)


def test_a_damaged_job_is_refused(corpus: Path, undisturbed: Path) -> None:
    os.truncate(undisturbed / "_snax" / "job.json", 50)
    with pytest.raises(StoreError, match="job.json is damaged"):
        extract(small.model(), job(undisturbed, corpus))


OTHERS = {
    "fingerprint": {"model": snax.SNAC(small.CONFIG, rngs=snax.codec.model.nnx.Rngs(1))},
    "channels": {"separate": True},
    "tokens": {"tokens": "shared"},
    "max_seconds": {"max_seconds": 10.0},
    "plan": {"clips_per_shard": 4},
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_job_is_refused(what: str, corpus: Path, undisturbed: Path) -> None:
    before = contents(undisturbed)
    how = dict(OTHERS[what])
    model = how.pop("model", small.model())
    with pytest.raises(StoreError, match=f"other inputs or settings.*\n  {what}: .*, now ") as error:
        extract(model, job(undisturbed, corpus, **how))
    assert str(error.value).count(", now ") == 1
    assert contents(undisturbed) == before


def test_another_version_is_refused(corpus: Path, undisturbed: Path) -> None:
    with (
        mock.patch.object(run.importlib.metadata, "version", return_value="9"),
        pytest.raises(StoreError, match="snax: "),
    ):
        extract(small.model(), job(undisturbed, corpus))


def test_more_clips_are_refused(corpus: Path, undisturbed: Path) -> None:
    (corpus / "new.wav").write_bytes(CLIPS["000_16.wav"])
    with pytest.raises(StoreError, match="plan: "):
        extract(small.model(), job(undisturbed, corpus))


def test_a_folder_of_something_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    before = contents(corpus)
    with pytest.raises(StoreError, match="files of something else"):
        extract(small.model(), job(corpus, corpus))
    assert contents(corpus) == before


@pytest.mark.parametrize("call", ["write_bytes", "replace"])
@pytest.mark.parametrize("number", [1, 3, 4, 5, 9])
def test_a_disk_that_fails(call: str, number: int, corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    real, calls = getattr(Path, call), []

    def failing(self: Path, *arguments: Any) -> Any:
        calls.append(self)
        if len(calls) < number:
            return real(self, *arguments)
        if call == "write_bytes":
            real(self, arguments[0][: len(arguments[0]) // 2])
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    with mock.patch.object(Path, call, failing), pytest.raises(OSError, match="No space left"):
        extract(small.model(), job(out, corpus))
    assert not (out / "_SUCCESS").exists()
    assert not list(out.rglob(".snax-*"))
    extract(small.model(), job(out, corpus))
    assert shards(out) == shards(undisturbed)


def mutations() -> Iterator[tuple[str, bytes, str]]:
    """Audio that is none any more: name, content, and what is said of it."""
    rng = np.random.default_rng(0)
    for name, content in ((f"m_{suffix}", corpora.encoded(suffix, 1)) for suffix in corpora.FORMATS):
        stem, _, suffix = name.rpartition(".")
        yield f"{stem}_half.{suffix}", content[: len(content) // 2], "not whole|can't be decoded|no audio"
        yield f"{stem}_nothing.{suffix}", b"", "no audio"
        yield f"{stem}_random.{suffix}", rng.bytes(5000), "no audio"
        yield f"{stem}_zeros.{suffix}", bytes(5000), "no audio"
        yield f"{stem}_head.{suffix}", rng.bytes(64) + content[64:], ""
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(60 * 8000), 8000, format="FLAC")
    yield "bomb.flac", silence.getvalue(), "longer than 30 seconds"
    yield "text.wav", b"RIFF, he said, was a place in Morocco.", "no audio"


def test_every_mutilation_ends_in_quarantine(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    mutated = {name: (content, reason) for name, content, reason in mutations()}
    for name, (content, _) in mutated.items():
        (corpus / name).write_bytes(content)
    (corpus / "folder.wav").mkdir()
    (corpus / "gone.wav").symlink_to(corpus / "nowhere.wav")
    whole = corpora.encoded("a.flac", 1)
    (corpus / "really_flac.mp3").write_bytes(whole)  # which is nothing bad: what counts is the content
    out = tmp_path / "out"
    end = extract(small.model(), job(out, corpus, max_seconds=30.0, max_quarantined=0.9, clips_per_shard=10))
    found, bad = {row["id"]: row for row in rows(out)}, quarantined(out)
    for name, (_, reason) in mutated.items():
        if reason:
            assert any(part in bad[name] for part in reason.split("|")), f"{name}: {bad[name]}"
        else:  # some of these headers are not needed to decode, or not all of them
            assert (name in bad) != (name in found)
    assert end["total"]["clips"] == len(found) + len(bad) == 12 + len(mutated) + 1 + ("gone.wav" in bad)
    expected = {row["id"]: row for row in rows(undisturbed)}
    for name in expected:
        assert found[name] == expected[name], "the others are unharmed"
    heard = audio.read(io.BytesIO(whole), small.CONFIG.sampling_rate)
    np.testing.assert_array_equal(found["really_flac.mp3"]["codes_0"], small.model().encode(heard[None])[0][0])


def test_a_disk_that_can_not_be_read_stops_the_run(corpus: Path, tmp_path: Path) -> None:
    with (corpus / "unreadable.jsonl").open("w") as file:
        file.write('{"path": "/proc/self/mem"}\n')
    with pytest.raises(OSError, match="/proc/self/mem can't be read: OSError"):
        extract(small.model(), job(tmp_path / "out", corpus / "unreadable.jsonl"))


def test_too_many_bad_clips_stop_the_run(tmp_path: Path) -> None:
    clips = corpora.clips(30)
    clips |= {f"bad_{i}.wav": b"bad" for i in range(12)}
    corpus = corpora.folder(tmp_path / "corpus", clips)
    with pytest.raises(run.TooManyUnreadableError, match="12 of 42 clips can't be read, more than 10%, the last"):
        extract(small.model(), job(tmp_path / "out", corpus, clips_per_shard=100))
    assert not list((tmp_path / "out").glob("tokens-*"))
    end = extract(small.model(), job(tmp_path / "out", corpus, clips_per_shard=100, max_quarantined=0.5))
    assert (end["total"]["committed"], end["total"]["quarantined"]) == (30, 12)


def test_retry_quarantined(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    clip = next(corpus.glob("*_a.mp3"))
    content = clip.read_bytes()
    clip.write_bytes(bytes(len(content)))  # as large as before: the plan stays the same
    out = tmp_path / "out"
    extract(small.model(), job(out, corpus))
    assert quarantined(out).keys() == {clip.name}
    clip.write_bytes(content)
    assert extract(small.model(), job(out, corpus))["shards"] == 0
    end = extract(small.model(), job(out, corpus, retry_quarantined=True))
    assert (end["shards"], end["total"]["quarantined"]) == (1, 0)
    assert shards(out) == shards(undisturbed)


def test_no_input(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no clips in .*nothing: 0 files were looked at"):
        extract(small.model(), job(tmp_path / "out", tmp_path / "nothing"))


def test_a_store_of_objects(corpus: Path, undisturbed: Path) -> None:
    memory = fsspec.filesystem("memory")
    url = "memory://bucket/out"
    extract(small.model(), ExtractConfig([str(corpus)], url, "small", clips_per_shard=5, num_workers=2))
    found = {path.rpartition("/")[2]: memory.cat_file(path) for path in memory.glob("/bucket/out/tokens-*")}
    assert found == {name: content for name, content in shards(undisturbed).items() if name.startswith("tokens")}
    assert len(snax.open_tokens(url)) == 12
