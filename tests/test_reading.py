"""Clips of tables and tars, and the reason for each that can't be read."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from helpers import corpora
from helpers.corpora import read

from snax.data.corpus import Source

CLIPS = corpora.clips(7)


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
