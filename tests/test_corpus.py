"""What a corpus is found to be made of, and how it is planned and read."""

import io
import json
import os
import re
import tarfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import corpora
from hypothesis import given, settings
from hypothesis import strategies as st

from snax.data import corpus, decoding
from snax.data.corpus import CorpusError, Source, plan
from snax.data.reading import Unreadable, clips

CLIPS = corpora.clips(7)


def ids(*inputs: Path | str) -> list[str]:
    """Of all clips, in the plan's order."""
    shards = plan([str(given) for given in inputs], 1000)
    return [clip.id for sources in shards for source in sources for clip, _ in clips(source)]


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    folder = corpora.folder(tmp_path / "a [b]", CLIPS)  # what looks like a pattern, but is there
    (folder / "notes.txt").write_text("no audio")
    everything = sorted(("below/" if i % 3 == 0 else "") + name for i, name in enumerate(CLIPS))
    assert ids(folder) == everything
    assert ids(folder / "below" / "000_16.wav") == ["000_16.wav"]


def test_patterns(tmp_path: Path) -> None:
    folder = corpora.folder(tmp_path / "corpus", CLIPS)
    assert ids(folder / "*.mp3") == ["004_a.mp3"]
    everywhere = ["001_float.wav", "below/000_16.wav", "below/006_16.wav"]
    assert sorted(ids(folder / "**" / "*.wav")) == everywhere, "named from where the pattern begins"


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


# As a file may be called: as patterns, URLs and options look, with escapes of terminals, and not in UTF-8.
ODD_NAMES = [
    *(b"a::b.wav", b"zip::a.wav", b"file:x.wav", b"glob[1].wav", b"star*.wav", b"hash#.wav", b"per%20cent.wav"),
    *(b"-dash.wav", b"new\nline.wav", b"esc\x1b[31m.wav", b"q\"uo'te.wav", b"back\\slash.wav", b"$HOME.wav"),
    *("\u00fcn\u00ef.wav".encode(), b"\xff\xfe.wav", b"x" * 250 + b".wav"),
]


def test_names_of_all_kinds(tmp_path: Path) -> None:
    """Each is found in its folder and by itself, and what is read is what is there."""
    for name in ODD_NAMES:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    shards = plan([str(tmp_path)], 1000)
    assert corpus.from_parquet(corpus.to_parquet(shards)) == shards
    contents = [content for source in shards[0] for _, content in clips(source)]
    assert sorted(decoding._bytes(content) for content in contents) == sorted(ODD_NAMES)
    names = [clip.id for source in shards[0] for clip, _ in clips(source)]
    assert len(set("\n".join(names).encode())) > 40, "they are text"
    assert "\\udcff\\udcfe.wav" in names
    for source in shards[0]:
        assert plan([source.file], 1000) == [[source]]


def test_what_is_no_file(tmp_path: Path) -> None:
    """A manifest's clips that are not there in one way or another are unreadable, and no reason to stop."""
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "a.wav").write_bytes(b"a")
    names = {"pipe.wav": "is no regular file.", "/dev/zero": "is no regular file.", ".": "is a folder."}
    names |= dict.fromkeys(["loop.wav", "a.wav/b.wav", "x" * 300 + ".wav", "x/" * 3000], "is not there.")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in names))
    (shard,) = plan([str(tmp_path / "m.jsonl")], 100)
    assert [decoding._bytes(source.file) for source in shard] == [Unreadable(reason) for reason in names.values()]


def test_links_in_a_folder(tmp_path: Path) -> None:
    """Those to files are followed, as corpora are made of them; folders that go round in circles are not."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.wav").write_bytes(b"b")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.wav").symlink_to(tmp_path / "elsewhere" / "b.wav")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "corpus")
    assert ids(tmp_path / "corpus") == ["a.wav"]


def test_a_table_of_something_else(tmp_path: Path) -> None:
    """The message names the file, and does not write to terminals what columns are called."""
    pq.write_table(pa.table({"text": ["a"], "\x1b[31m": [1]}), tmp_path / "t.parquet")
    with pytest.raises(CorpusError) as caught:
        ids(tmp_path / "t.parquet")
    assert f"{tmp_path / 't.parquet'}: a table must have one column with audio, or one of path, " in str(caught.value)
    assert r"this one has ['text: string', '\x1b[31m: int64']." in str(caught.value)


def read(source: Source) -> dict[str, bytes | str]:
    """What is read of each clip, or the reason why not."""
    return {clip.id: content.reason if isinstance(content, Unreadable) else content for clip, content in clips(source)}


def test_rows_of_a_table(tmp_path: Path) -> None:
    path = str(corpora.table(tmp_path / "t.parquet", CLIPS, ids=False))
    contents = list(CLIPS.values())
    for first, end in ((0, 7), (2, 5), (3, 6), (6, 7)):
        found = read(Source("rows", path, "t", first, end))
        assert found == {f"t/{i}": contents[i] for i in range(first, end)}


def test_a_table_with_paths_and_nothing(tmp_path: Path) -> None:
    audio = [{"bytes": b"a", "path": None}, {"bytes": None, "path": "b.wav"}, {"bytes": None, "path": None}, None]
    pq.write_table(pa.table({"audio": audio}), tmp_path / "t.parquet")
    found = list(read(Source("rows", str(tmp_path / "t.parquet"), "t", 0, 5)).values())
    assert found[:2] == [b"a", f"{tmp_path}/b.wav"]
    assert found[2:4] == ["its row has neither bytes nor a path."] * 2
    assert found[4].startswith("the table has fewer rows"), "planned for five, and now there are four"


def test_a_damaged_table(tmp_path: Path) -> None:
    path = corpora.table(tmp_path / "t.parquet", CLIPS)
    whole = path.read_bytes()
    for at in range(10, len(whole), len(whole) // 20):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        found = read(Source("rows", str(path), "t", 0, 7))
        assert len(found) == 7, "every row is accounted for"
    os.truncate(path, len(whole) // 2)
    reasons = set(read(Source("rows", str(path), "t", 0, 7)).values())
    assert len(reasons) == 1
    assert reasons.pop().startswith("its table is damaged: ")


def test_a_tar(tmp_path: Path) -> None:
    path = str(corpora.tar(tmp_path / "t.tar", CLIPS))
    assert read(Source("tar", path, "t")) == {Path(name).stem: content for name, content in CLIPS.items()}


def test_a_tar_of_a_stranger(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name, kind in (
            ("../../up.wav", tarfile.REGTYPE),
            ("/root.wav", tarfile.REGTYPE),
            ("link.wav", tarfile.SYMTYPE),
            ("hard.wav", tarfile.LNKTYPE),
            ("pipe.wav", tarfile.FIFOTYPE),
            ("folder.wav", tarfile.DIRTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            entry.size = 1 if kind == tarfile.REGTYPE else 0
            archive.addfile(entry, io.BytesIO(b"a"))
    before = sorted(tmp_path.rglob("*"))
    link = "is a link or something else that is no regular file."
    found = read(Source("tar", str(tmp_path / "t.tar"), "t"))
    assert found == {"../../up": b"a", "/root": b"a", "link": link, "hard": link, "pipe": link}
    assert sorted(tmp_path.rglob("*")) == before, "nothing is extracted"


def test_a_large_promise_in_a_tar(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("a.wav")
    entry.size = 5 * 2**30
    (tmp_path / "t.tar").write_bytes(entry.tobuf())
    found = read(Source("tar", str(tmp_path / "t.tar"), "t"))
    assert found["a"] == f"is {5 * 2**30} bytes large, more than {2**32}."
    assert "the tar is damaged" in found["t"]


def test_damaged_tars_lose_nothing_silently(tmp_path: Path) -> None:
    path = corpora.tar(tmp_path / "t.tar", CLIPS)
    whole, expected = path.read_bytes(), {Path(name).stem: content for name, content in CLIPS.items()}
    end = len(whole.rstrip(b"\0"))
    cuts = [(whole[:at], at) for at in range(0, end, 997)]
    flips = [(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], at) for at in range(156, end, 4096 * 3)]
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
    flips += [(whole[:at] + b"\xff" + whole[at + 1 :], at) for at in (offset + 150 for offset in headers)]
    for content, at in cuts + flips:
        path.write_bytes(content)
        found = read(Source("tar", str(path), "t"))
        if "t" in found:
            assert "the tar is damaged" in found["t"]
        else:  # all members are there; one may have another byte, which is for its decoder to see
            assert found.keys() == expected.keys(), f"damage at byte {at} of {len(whole)}"


def test_a_source_that_is_gone(tmp_path: Path) -> None:
    assert read(Source("tar", str(tmp_path / "t.tar"), "t")) == {"t": "is not there any more."}
