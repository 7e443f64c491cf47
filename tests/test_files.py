"""The files that an argument names: files, folders, patterns, and names of all kinds."""

import os
from pathlib import Path

from helpers import corpora
from helpers.corpora import ids

from snax.data import corpus, decoding
from snax.data.corpus import plan
from snax.data.reading import clips

CLIPS = corpora.clips(7)


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


def test_links_in_a_folder(tmp_path: Path) -> None:
    """Those to files are followed, as corpora are made of them; folders that go round in circles are not."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.wav").write_bytes(b"b")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.wav").symlink_to(tmp_path / "elsewhere" / "b.wav")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "corpus")
    assert ids(tmp_path / "corpus") == ["a.wav"]
