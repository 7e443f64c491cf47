"""Plans of corpora: division into shards, manifests and tables, and rejection of invalid inputs."""

import io
import json
import re
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import corpora
from helpers.corpora import clip_ids, read_clips
from hypothesis import given, settings
from hypothesis import strategies as st

from snax.data import corpus
from snax.data.corpus import CorpusError, Source, plan

CLIPS = corpora.clips(7)


def _rows(source: Source) -> range:
    return range(source.first, max(1, source.end))


# Kinds of sources, and the number of files, rows or tars.
KINDS = st.lists(st.tuples(st.sampled_from(["file", "rows", "tar"]), st.integers(0, 40)), max_size=8)


@settings(deadline=None)
@given(KINDS, st.integers(1, 20))
def test_plan_contains_every_clip_once(kinds: list[tuple[str, int]], clips_per_shard: int) -> None:
    sources = []
    for i, (kind, count) in enumerate(kinds):
        if kind == "rows":
            sources.append(Source("rows", f"t{i}", f"t{i}", end=count))
        else:
            sources += [Source(kind, f"{kind}{i}-{j}", f"{kind}{i}-{j}") for j in range(count)]
    shards = corpus.shards_of(sources, clips_per_shard)
    # Shards are disjoint, complete and in order. Tables without rows have no clips.
    nonempty = [source for source in sources if source.kind != "rows" or source.end]
    rows = [(source.file, row) for source in nonempty for row in _rows(source)]
    planned = [(source.file, row) for shard in shards for source in shard for row in _rows(source)]
    assert planned == rows
    for shard in shards:
        assert 0 < sum(max(1, source.end - source.first) for source in shard) <= clips_per_shard
        assert len(shard) == 1 or {source.kind for source in shard} == {"file"}
    assert corpus.from_parquet(corpus.to_parquet(shards)) == shards
    # For any number of processes, each shard belongs to one process.
    for processes in (1, 2, 7):
        assert sorted(s for p in range(processes) for s in range(p, len(shards), processes)) == list(range(len(shards)))


def test_rejects_duplicate_ids(tmp_path: Path) -> None:
    for name in ("a", "b"):
        corpora.folder(tmp_path / name, CLIPS)
    with pytest.raises(CorpusError, match="two clips have the same id, 001_float.wav: .*/a/.* and .*/b/"):
        clip_ids(tmp_path / "a", tmp_path / "b")
    assert len(clip_ids(tmp_path)) == 14, "ids relative to the parent folder differ"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"path": "a.wav"}\n{"path": \n', "cannot be read as jsonl"),
        ("a.jsonl", '{"path": "a.wav"}\n{"text": "a"}\n', "clip 2: no path. Expected one of the fields path, audio"),
        ("a.jsonl", '["a.wav"]\n', "clip 1: expected an object with a path, got .*a.wav"),
        ("a.jsonl", '{"path": 7}\n', "no path"),
        ("a.jsonl", "", "found no clips in"),
        ("a.csv", "name,text\na.wav,b\n", "no path"),
        ("a.csv", 'path\n"a.wav\n', "cannot be read as csv"),
        ("a.csv", "path\n\xff\n", "cannot be read as csv"),
        ("a.parquet", "no table", "cannot be read as Parquet"),
    ],
)
def test_rejects_invalid_manifests(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CorpusError, match=message):
        clip_ids(tmp_path / name)


def test_parquet_manifest(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"path": ["a.wav", "/b.wav", "gs://bucket/c.wav"], "key": ["a", "b", "c"]}), tmp_path / "m.parquet"
    )
    (shard,) = plan([str(tmp_path / "m.parquet")], 10)
    assert [(source.id, source.file) for source in shard] == [
        ("a", f"{tmp_path}/a.wav"),
        ("b", "/b.wav"),
        ("c", "gs://bucket/c.wav"),
    ]


REMOTE_MANIFEST_PATHS = {
    "../secret.wav": None,  # allowed, because it refers to the same remote store
    "/etc/passwd": "is a local file, which a remote manifest cannot refer to",
    "file:///etc/passwd": "is not an allowed URL in a manifest",
    "local:///etc/passwd": "is not an allowed URL in a manifest",
    "git://a.wav": "is not an allowed URL in a manifest",  # fsspec would read it from a local repository
    "nothing://a.wav": "is not an allowed URL in a manifest",
    "simplecache::http://a/b.wav": "is not an allowed URL in a manifest",
    "zip://a.wav::gs://b/c.zip": "is not an allowed URL in a manifest",
    "http://a/b.wav::gs://b/c.wav": "is not an allowed URL in a manifest",
    "a\0.wav": "is not a valid file name",
    "\ud800.wav": "is not a valid file name",
}


@pytest.mark.parametrize("path", REMOTE_MANIFEST_PATHS)
def test_rejects_unsafe_paths_in_remote_manifests(path: str) -> None:
    """A manifest is rejected as a whole. In a table with audio, only the row is unreadable."""
    store = fsspec.filesystem("memory")
    store.pipe_file("/lists/m.jsonl", json.dumps({"path": path}).encode())
    if (message := REMOTE_MANIFEST_PATHS[path]) is None:
        ((source,),) = plan(["memory://lists/m.jsonl"], 10)
        assert source.file.startswith("memory://")
        return
    with pytest.raises(CorpusError, match=re.escape(f"m.jsonl, clip 1: {path!r} {message}")):
        plan(["memory://lists/m.jsonl"], 10)
    if path.startswith("\ud800"):  # Parquet cannot store it
        return
    sink = io.BytesIO()
    pq.write_table(pa.table({"audio": [{"bytes": None, "path": path}]}), sink)
    store.pipe_file("/lists/t.parquet", sink.getvalue())
    assert f"{path!r} {message}" in read_clips(Source("rows", "memory://lists/t.parquet", "t", 0, 1))["t/0"]


def test_rejects_table_with_more_rows_than_bytes(tmp_path: Path) -> None:
    """A billion empty rows compress to a few kilobytes."""
    empty = pa.DictionaryArray.from_arrays(pa.array([0] * 10**6, pa.int8()), pa.array([b""]))
    pq.write_table(pa.table({"audio": empty.cast(pa.binary())}), tmp_path / "t.parquet")
    with pytest.raises(CorpusError, match=r"declares 1000000 rows in \d+ bytes"):
        plan([str(tmp_path / "t.parquet")], 10)


def test_rejects_table_without_audio(tmp_path: Path) -> None:
    """The message contains the file and escapes the names of the columns."""
    pq.write_table(pa.table({"text": ["a"], "\x1b[31m": [1]}), tmp_path / "t.parquet")
    with pytest.raises(CorpusError) as error:
        clip_ids(tmp_path / "t.parquet")
    assert str(error.value).startswith(f"{tmp_path / 't.parquet'}: a table must have one column with audio bytes, or ")
    assert r"got ['text: string', '\x1b[31m: int64']." in str(error.value)
