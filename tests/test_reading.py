"""Reading of clips in tables and tars, and reasons for clips that cannot be read."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import corpora
from helpers.corpora import read_clips

from snax.data.corpus import Source

CLIPS = corpora.clips(7)


def test_rows_of_a_table(tmp_path: Path) -> None:
    path = str(corpora.table(tmp_path / "t.parquet", CLIPS, ids=False))
    contents = list(CLIPS.values())
    for first, end in ((0, 7), (2, 5), (3, 6), (6, 7)):
        clips = read_clips(Source("rows", path, "t", first, end))
        assert clips == {f"t/{i}": contents[i] for i in range(first, end)}


def test_table_with_paths_and_missing_audio(tmp_path: Path) -> None:
    audio = [{"bytes": b"a", "path": None}, {"bytes": None, "path": "b.wav"}, {"bytes": None, "path": None}, None]
    pq.write_table(pa.table({"audio": audio}), tmp_path / "t.parquet")
    contents = list(read_clips(Source("rows", str(tmp_path / "t.parquet"), "t", 0, 5)).values())
    assert contents[:2] == [b"a", f"{tmp_path}/b.wav"]
    assert contents[2:4] == ["the row has neither audio bytes nor a path."] * 2
    assert contents[4].startswith("the table has fewer rows"), "the plan has five rows, and the table has four"


def test_corrupt_table(tmp_path: Path) -> None:
    path = corpora.table(tmp_path / "t.parquet", CLIPS)
    whole = path.read_bytes()
    for offset in range(10, len(whole), len(whole) // 20):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 255]) + whole[offset + 1 :])
        clips = read_clips(Source("rows", str(path), "t", 0, 7))
        assert len(clips) == 7, "every row must have a result"
    os.truncate(path, len(whole) // 2)
    reasons = set(read_clips(Source("rows", str(path), "t", 0, 7)).values())
    assert len(reasons) == 1
    assert reasons.pop().startswith("the table is corrupt: ")


def test_tar(tmp_path: Path) -> None:
    path = str(corpora.tar(tmp_path / "t.tar", CLIPS))
    assert read_clips(Source("tar", path, "t")) == {Path(name).stem: content for name, content in CLIPS.items()}


def test_malicious_tar_members(tmp_path: Path) -> None:
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
    reason = "not a regular file but, for example, a link or a device."
    clips = read_clips(Source("tar", str(tmp_path / "t.tar"), "t"))
    assert clips == {"../../up": b"a", "/root": b"a", "link": reason, "hard": reason, "pipe": reason}
    assert sorted(tmp_path.rglob("*")) == before, "tars must not be extracted"


def test_tar_member_above_the_size_limit(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("a.wav")
    entry.size = 5 * 2**30
    (tmp_path / "t.tar").write_bytes(entry.tobuf())
    clips = read_clips(Source("tar", str(tmp_path / "t.tar"), "t"))
    assert clips["a"] == f"the size of {5 * 2**30} bytes exceeds the limit of {2**32} bytes."
    assert "the tar is corrupt" in clips["t"]


def test_corruption_of_tars_is_detected(tmp_path: Path) -> None:
    path = corpora.tar(tmp_path / "t.tar", CLIPS)
    whole, expected = path.read_bytes(), {Path(name).stem: content for name, content in CLIPS.items()}
    end = len(whole.rstrip(b"\0"))
    cuts = [(whole[:i], i) for i in range(0, end, 997)]
    flips = [(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :], i) for i in range(156, end, 4096 * 3)]
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
    flips += [(whole[:i] + b"\xff" + whole[i + 1 :], i) for i in (offset + 150 for offset in headers)]
    for content, offset in cuts + flips:
        path.write_bytes(content)
        clips = read_clips(Source("tar", str(path), "t"))
        if "t" in clips:
            assert "the tar is corrupt" in clips["t"]
        else:  # all members exist, but the content of one may be corrupt, which its decoder detects
            assert clips.keys() == expected.keys(), f"corrupt byte {offset} of {len(whole)}"


def test_missing_source(tmp_path: Path) -> None:
    assert read_clips(Source("tar", str(tmp_path / "t.tar"), "t")) == {"t": "the file no longer exists."}
