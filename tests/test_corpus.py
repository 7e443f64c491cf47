"""What a corpus is found to be made of, and how it is planned and read."""

import io
import json
import re
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import corpora
from helpers.corpora import ids, read
from hypothesis import given, settings
from hypothesis import strategies as st

from snax.data import corpus
from snax.data.corpus import CorpusError, Source, plan

CLIPS = corpora.clips(7)


def _rows(source: Source) -> range:
    return range(source.first, max(1, source.end))


# Sources of every kind: how many files, rows of tables, tars, in turn.
KINDS = st.lists(st.tuples(st.sampled_from(["file", "rows", "tar"]), st.integers(0, 40)), max_size=8)


@settings(deadline=None)
@given(KINDS, st.integers(1, 20))
def test_a_plan_has_every_clip_once(kinds: list[tuple[str, int]], clips_per_shard: int) -> None:
    sources = []
    for i, (kind, count) in enumerate(kinds):
        if kind == "rows":
            sources.append(Source("rows", f"t{i}", f"t{i}", end=count))
        else:
            sources += [Source(kind, f"{kind}{i}-{j}", f"{kind}{i}-{j}") for j in range(count)]
    shards = corpus.shards_of(sources, clips_per_shard)
    # Disjoint, complete, and in order; a table of no rows has no clips.
    some = [source for source in sources if source.kind != "rows" or source.end]
    rows = [(source.file, row) for source in some for row in _rows(source)]
    planned = [(source.file, row) for shard in shards for source in shard for row in _rows(source)]
    assert planned == rows
    for shard in shards:
        assert 0 < sum(max(1, source.end - source.first) for source in shard) <= clips_per_shard
        assert len(shard) == 1 or {source.kind for source in shard} == {"file"}
    assert corpus.from_parquet(corpus.to_parquet(shards)) == shards
    # Any number of processes: each shard is one's.
    for processes in (1, 2, 7):
        assert sorted(s for p in range(processes) for s in range(p, len(shards), processes)) == list(range(len(shards)))


def test_two_clips_of_one_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        corpora.folder(tmp_path / name, CLIPS)
    with pytest.raises(CorpusError, match="two clips would be called 001_float.wav: .*/a/.* and .*/b/"):
        ids(tmp_path / "a", tmp_path / "b")
    assert len(ids(tmp_path)) == 14, "from the folder above they differ"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"path": "a.wav"}\n{"path": \n', "can't be read as jsonl"),
        ("a.jsonl", '{"path": "a.wav"}\n{"text": "a"}\n', "clip 2: has no path; it would be in one of path, audio"),
        ("a.jsonl", '["a.wav"]\n', "clip 1: is .*, not an object with a path"),
        ("a.jsonl", '{"path": 7}\n', "has no path"),
        ("a.jsonl", "", "no clips in"),
        ("a.csv", "name,text\na.wav,b\n", "has no path"),
        ("a.csv", 'path\n"a.wav\n', "can't be read as csv"),
        ("a.csv", "path\n\xff\n", "can't be read as csv"),
        ("a.parquet", "no table", "can't be read as Parquet"),
    ],
)
def test_manifests_that_are_none(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CorpusError, match=message):
        ids(tmp_path / name)


def test_a_manifest_of_paths_in_parquet(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"path": ["a.wav", "/b.wav", "gs://bucket/c.wav"], "key": ["a", "b", "c"]}), tmp_path / "m.parquet"
    )
    (shard,) = plan([str(tmp_path / "m.parquet")], 10)
    assert [(source.id, source.file) for source in shard] == [
        ("a", f"{tmp_path}/a.wav"),
        ("b", "/b.wav"),
        ("c", "gs://bucket/c.wav"),
    ]


NOT_LISTED = {
    "../secret.wav": None,  # from elsewhere it stays elsewhere
    "/etc/passwd": "is a file of this machine, which a list from elsewhere can't name",
    "file:///etc/passwd": "is no URL that a list may have",
    "local:///etc/passwd": "is no URL that a list may have",
    "git://a.wav": "is no URL that a list may have",  # it would be read from this machine's repositories
    "nothing://a.wav": "is no URL that a list may have",
    "simplecache::http://a/b.wav": "is no URL that a list may have",
    "zip://a.wav::gs://b/c.zip": "is no URL that a list may have",
    "http://a/b.wav::gs://b/c.wav": "is no URL that a list may have",
    "a\0.wav": "can't be the name of a file",
    "\ud800.wav": "can't be the name of a file",
}


@pytest.mark.parametrize("path", NOT_LISTED)
def test_what_a_list_from_elsewhere_names(path: str) -> None:
    """A manifest and a table of a store: the first is refused, a row of the second is no clip."""
    store = fsspec.filesystem("memory")
    store.pipe_file("/lists/m.jsonl", json.dumps({"path": path}).encode())
    if (message := NOT_LISTED[path]) is None:
        ((source,),) = plan(["memory://lists/m.jsonl"], 10)
        assert source.file.startswith("memory://")
        return
    with pytest.raises(CorpusError, match=re.escape(f"m.jsonl, clip 1: {path!r} {message}")):
        plan(["memory://lists/m.jsonl"], 10)
    if path.startswith("\ud800"):  # Parquet has no such text
        return
    sink = io.BytesIO()
    pq.write_table(pa.table({"audio": [{"bytes": None, "path": path}]}), sink)
    store.pipe_file("/lists/t.parquet", sink.getvalue())
    assert f"{path!r} {message}" in read(Source("rows", "memory://lists/t.parquet", "t", 0, 1))["t/0"]


def test_a_table_of_more_rows_than_bytes(tmp_path: Path) -> None:
    """A thousand million rows of nothing are a few kilobytes."""
    nothing = pa.DictionaryArray.from_arrays(pa.array([0] * 10**6, pa.int8()), pa.array([b""]))
    pq.write_table(pa.table({"audio": nothing.cast(pa.binary())}), tmp_path / "t.parquet")
    with pytest.raises(CorpusError, match=r"promises 1000000 rows in \d+ bytes"):
        plan([str(tmp_path / "t.parquet")], 10)


def test_a_table_of_something_else(tmp_path: Path) -> None:
    """The message names the file, and does not write to terminals what columns are called."""
    pq.write_table(pa.table({"text": ["a"], "\x1b[31m": [1]}), tmp_path / "t.parquet")
    with pytest.raises(CorpusError) as caught:
        ids(tmp_path / "t.parquet")
    assert f"{tmp_path / 't.parquet'}: a table must have one column with audio, or one of path, " in str(caught.value)
    assert r"this one has ['text: string', '\x1b[31m: int64']." in str(caught.value)
