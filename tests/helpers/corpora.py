"""Corpora of real audio in all input formats."""

import csv
import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from helpers.recordings import DATA
from snax.data import corpus, reading

# Suffix: sampling rate, and soundfile's arguments that do not follow from the suffix.
FORMATS = {
    "16.wav": (16_000, {}),
    "float.wav": (44_100, {"subtype": "FLOAT"}),
    "a.flac": (44_100, {}),
    "a.ogg": (24_000, {}),
    "a.mp3": (48_000, {}),
    "a.opus": (48_000, {"format": "OGG", "subtype": "OPUS"}),
}


def encoded(name: str, seconds: float, begin: float = 0, channels: int = 1) -> bytes:
    """Encode speech in the format of the file name's suffix. Its sampling rate is changed without resampling."""
    suffix = next(suffix for suffix in FORMATS if name.endswith(suffix))
    rate, options = FORMATS[suffix]
    speech = soundfile.read(DATA / "speech_7s.wav")[0]
    part = np.resize(np.roll(speech, -round(begin * 16_000)), round(seconds * rate))
    samples = np.stack([np.roll(part, 1000 * channel) for channel in range(channels)], axis=1)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": Path(name).suffix[1:].upper()} | options)
    return file.getvalue()


def clips(count: int, seed: int = 0) -> dict[str, bytes]:
    """Make `count` files of 0.05 to 1 s in all formats. Every second file has two channels."""
    rng = np.random.default_rng(seed)
    names = [f"{i:03}_{suffix}" for i, suffix in zip(range(count), itertools.cycle(FORMATS), strict=False)]
    return {
        name: encoded(name, rng.uniform(0.05, 1), rng.uniform(0, 5), channels=1 + i % 2) for i, name in enumerate(names)
    }


MIXED_SHARDS = 34  # of `mixed`, with at most four clips each; the tar is one shard


def mixed(path: Path) -> Path:
    """Write a corpus of 121 files, of which one is bad, a table of six rows and a tar."""
    folder(path, clips(120, seed=1) | {"bad.wav": b"bad"})
    table(path / "a.parquet", clips(6, seed=2))
    tar(path / "a.tar", clips(6, seed=3))
    return path


def folder(path: Path, files: dict[str, bytes]) -> Path:
    """Write files into a folder, every third file into a subfolder."""
    (path / "below").mkdir(parents=True)
    for i, (name, content) in enumerate(files.items()):
        (path / ("below" if i % 3 == 0 else "") / name).write_bytes(content)
    return path


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """Write a WebDataset tar whose samples consist of audio and text."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            for member, data in ((f"{Path(name).stem}.txt", b"some text"), (name, content)):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return path


def table(path: Path, files: dict[str, bytes], *, ids: bool = True) -> Path:
    """Write a table with audio in the format of Hugging Face datasets, in small row groups."""
    columns = {"audio": [{"bytes": content, "path": name} for name, content in files.items()]}
    columns["text"] = ["some text"] * len(files)
    if ids:
        columns["id"] = [Path(name).stem for name in files]
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def manifest(path: Path, files: dict[str, bytes]) -> Path:
    """Write a manifest, .jsonl or .csv, and its files into a folder next to it."""
    folder = path.with_suffix("")
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    rows = [{"audio_filepath": f"{folder.name}/{name}", "id": Path(name).stem, "text": "some"} for name in files]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path


def contents(path: Path) -> dict[str, io.BytesIO]:
    """Return the audio in a tar or table by clip id."""
    if path.suffix == ".parquet":
        return {row["id"]: io.BytesIO(row["audio"]["bytes"]) for row in pq.read_table(path).to_pylist()}
    with tarfile.open(path) as archive:
        members = [member for member in archive if not member.name.endswith(".txt")]
        return {Path(member.name).stem: io.BytesIO(archive.extractfile(member).read()) for member in members}


def clip_ids(*inputs: Path | str) -> list[str]:
    """Return the ids of all clips, in the order of the plan."""
    shards = corpus.plan([str(argument) for argument in inputs], 1000)
    return [clip.id for sources in shards for source in sources for clip, _ in reading.clips(source)]


def read_clips(source: corpus.Source) -> dict[str, bytes | str]:
    """Return for each clip id its bytes or path, or the reason why it cannot be read."""
    return {
        clip.id: content.reason if isinstance(content, reading.Unreadable) else content
        for clip, content in reading.clips(source)
    }
