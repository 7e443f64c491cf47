"""Finding of files in folders and by patterns, with unusual names and links."""

import os
from pathlib import Path

from helpers import corpora
from helpers.corpora import clip_ids

from snax.data import corpus, decoding
from snax.data.corpus import plan
from snax.data.reading import clips

CLIPS = corpora.clips(7)


def test_folders_and_files(tmp_path: Path) -> None:
    folder = corpora.folder(tmp_path / "a [b]", CLIPS)  # an existing folder whose name looks like a pattern
    (folder / "notes.txt").write_text("not audio")
    names = sorted(("below/" if i % 3 == 0 else "") + name for i, name in enumerate(CLIPS))
    assert clip_ids(folder) == names
    assert clip_ids(folder / "below" / "000_16.wav") == ["000_16.wav"]


def test_patterns(tmp_path: Path) -> None:
    folder = corpora.folder(tmp_path / "corpus", CLIPS)
    assert clip_ids(folder / "*.mp3") == ["004_a.mp3"]
    expected = ["001_float.wav", "below/000_16.wav", "below/006_16.wav"]
    assert sorted(clip_ids(folder / "**" / "*.wav")) == expected, "names must be relative to the pattern's folder"


# Names that look like patterns, URLs or options, that contain terminal escapes, or that are not UTF-8.
UNUSUAL_NAMES = [
    *(b"a::b.wav", b"zip::a.wav", b"file:x.wav", b"glob[1].wav", b"star*.wav", b"hash#.wav", b"per%20cent.wav"),
    *(b"-dash.wav", b"new\nline.wav", b"esc\x1b[31m.wav", b"q\"uo'te.wav", b"back\\slash.wav", b"$HOME.wav"),
    *("\u00fcn\u00ef.wav".encode(), b"\xff\xfe.wav", b"x" * 250 + b".wav"),
]


def test_unusual_names(tmp_path: Path) -> None:
    """Each file is found in its folder and by its own path, and is read correctly."""
    for name in UNUSUAL_NAMES:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    shards = plan([str(tmp_path)], 1000)
    assert corpus.from_parquet(corpus.to_parquet(shards)) == shards
    contents = [content for source in shards[0] for _, content in clips(source)]
    assert sorted(decoding._read_file(content) for content in contents) == sorted(UNUSUAL_NAMES)
    names = [clip.id for source in shards[0] for clip, _ in clips(source)]
    assert len(set("\n".join(names).encode())) > 40, "names must be valid UTF-8"
    assert "\\udcff\\udcfe.wav" in names
    for source in shards[0]:
        assert plan([source.file], 1000) == [[source]]


def test_links(tmp_path: Path) -> None:
    """Links to files are followed, because many corpora consist of them. Cyclic links to folders are not."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.wav").write_bytes(b"b")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.wav").symlink_to(tmp_path / "elsewhere" / "b.wav")
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "corpus")
    assert clip_ids(tmp_path / "corpus") == ["a.wav"]
