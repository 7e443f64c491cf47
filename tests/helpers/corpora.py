"""Corpora of real audio in all the forms that a corpus comes in."""

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

# Name, sampling rate, and soundfile's arguments where the name does not say them.
FORMATS = {
    "16.wav": (16_000, {}),
    "float.wav": (44_100, {"subtype": "FLOAT"}),
    "a.flac": (44_100, {}),
    "a.ogg": (24_000, {}),
    "a.mp3": (48_000, {}),
    "a.opus": (48_000, {"format": "OGG", "subtype": "OPUS"}),
}


def encoded(name: str, seconds: float, begin: float = 0, channels: int = 1) -> bytes:
    """Some real speech in one of `FORMATS`, which `name` ends with. (Played at another rate, it is speech no more.)"""
    suffix = next(suffix for suffix in FORMATS if name.endswith(suffix))
    rate, how = FORMATS[suffix]
    speech = soundfile.read(DATA / "speech_7s.wav")[0]
    part = np.resize(np.roll(speech, -round(begin * 16_000)), round(seconds * rate))
    samples = np.stack([np.roll(part, 1000 * channel) for channel in range(channels)], axis=1)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, **{"format": Path(name).suffix[1:].upper()} | how)
    return file.getvalue()


def clips(count: int, seed: int = 0) -> dict[str, bytes]:
    """So many files of all formats, a twentieth of a second to one second long, some with two channels."""
    rng = np.random.default_rng(seed)
    names = [f"{i:03}_{suffix}" for i, suffix in zip(range(count), itertools.cycle(FORMATS), strict=False)]
    return {
        name: encoded(name, rng.uniform(0.05, 1), rng.uniform(0, 5), channels=1 + i % 2) for i, name in enumerate(names)
    }


def folder(path: Path, files: dict[str, bytes]) -> Path:
    """Files in a folder, every third one in one below."""
    (path / "below").mkdir(parents=True)
    for i, (name, content) in enumerate(files.items()):
        (path / ("below" if i % 3 == 0 else "") / name).write_bytes(content)
    return path


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """A WebDataset tar: each sample a text beside the audio."""
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            for member, data in ((f"{Path(name).stem}.txt", b"some text"), (name, content)):
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return path


def table(path: Path, files: dict[str, bytes], *, ids: bool = True) -> Path:
    """A table with audio as Hugging Face's datasets have it, in small groups of rows."""
    columns = {"audio": [{"bytes": content, "path": name} for name, content in files.items()]}
    columns["text"] = ["some text"] * len(files)
    if ids:
        columns["id"] = [Path(name).stem for name in files]
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def manifest(path: Path, files: dict[str, bytes]) -> Path:
    """A manifest, .jsonl or .csv, of files below it."""
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
    """The audio of a tar or table that was written here, by id."""
    if path.suffix == ".parquet":
        return {row["id"]: io.BytesIO(row["audio"]["bytes"]) for row in pq.read_table(path).to_pylist()}
    with tarfile.open(path) as archive:
        members = [member for member in archive if not member.name.endswith(".txt")]
        return {Path(member.name).stem: io.BytesIO(archive.extractfile(member).read()) for member in members}


def ids(*inputs: Path | str) -> list[str]:
    """Of all clips, in the plan's order."""
    shards = corpus.plan([str(given) for given in inputs], 1000)
    return [clip.id for sources in shards for source in sources for clip, _ in reading.clips(source)]


def read(source: corpus.Source) -> dict[str, bytes | str]:
    """What is read of each clip, or the reason why not."""
    return {
        clip.id: content.reason if isinstance(content, reading.Unreadable) else content
        for clip, content in reading.clips(source)
    }
