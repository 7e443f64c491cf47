"""What a corpus is made of, and which clips form which shard: a plan that depends on the inputs alone.

Inputs are local paths or URLs of fsspec (gs://, s3://).
"""

import csv
import hashlib
import io
import itertools
import json
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .. import json_text
from . import audio
from .files import find_files, open_fs

# Manifests and tables say in the first of these columns that they have where a clip is, and what it is called.
PATH_COLUMNS = ("path", "audio_filepath", "audio_path", "file", "url")
ID_COLUMNS = ("id", "key", "utt_id")
TABLE, TAR = ".parquet", ".tar"
# What the URLs in a list may begin with, beside that of the list itself. fsspec knows many more: some read this
# machine's files, some unpack or cache what they fetch.
STORES = frozenset({"abfs", "abfss", "az", "gcs", "gs", "hf", "http", "https", "s3", "s3a"})


class Source(NamedTuple):
    """Clips that lie together: a file, some rows of a table with audio in it, or all of a tar.

    A tar's clips are not known before it is read, and it can only be read from its beginning: it is a shard.
    """

    kind: str  # "file", "rows" or "tar"
    file: str
    id: str  # of the clip; of what its clips' ids begin with, where these have none of their own
    first: int = 0  # row
    end: int = 0
    bytes: int = -1  # how large the file was when the plan was made, where that costs nothing to know


def resolve_path(folder: str, path: str) -> str:
    """The file that a manifest or table in `folder` means by `path`: relative to it, absolute, or a URL.

    Raises:
        CorpusError: for what a stranger's list has no business with: local files in a list that is not, other kinds
            of storage than STORES, several that are chained; and for what can't be the name of a file.
    """
    scheme, colon, _ = path.partition("://")
    home, remote, _ = folder.partition("://")
    if colon and (scheme not in STORES | {home if remote else "file"} or "::" in path):
        raise CorpusError(f"{path!r:.200} is no URL that a list may have, which are of {', '.join(sorted(STORES))}.")
    if remote and not colon and posixpath.isabs(path):
        raise CorpusError(f"{path!r:.200} is a file of this machine, which a list from elsewhere can't name.")
    try:
        if b"\0" not in os.fsencode(path):
            return path if colon else posixpath.join(folder, path)
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say
        pass
    raise CorpusError(f"{path!r:.200} can't be the name of a file.")


def escaped(name: str) -> str:
    """A name as text that any file can hold: names of files that are not UTF-8 have `\\udcff` for the byte 255."""
    return name.encode("utf-8", "backslashreplace").decode()


class CorpusError(ValueError):
    """Inputs that make no corpus: what is wrong, and where."""


def plan(inputs: Iterable[str], clips_per_shard: int) -> list[list[Source]]:
    """The sources of each shard.

    Args:
        inputs: files, patterns of files, and folders, of which what is called like audio, a table or a tar is taken.
            A file is audio; or a manifest (.jsonl, .csv, or .parquet with paths; relative ones begin at the manifest's
            folder), a table with the audio's bytes (.parquet, as Hugging Face's datasets have them), a WebDataset tar.
        clips_per_shard: at most; a tar is always one shard.

    Raises:
        CorpusError: if an input has no clips, can't be understood, or two clips have one id.
        OSError: for what can't be read.
    """
    sources = [source for argument in inputs for source in _sources(argument)]
    ids: dict[str, str] = {}
    for source in sources:
        if source.kind == "file":
            if source.id in ids:
                raise CorpusError(f"two clips would be called {source.id}: {ids[source.id]} and {source.file}.")
            ids[source.id] = source.file
    return shards_of(sources, clips_per_shard)


def shards_of(sources: Iterable[Source], clips_per_shard: int) -> list[list[Source]]:
    """Divide sources, in their order, among shards. Each shard has sources of one kind."""
    shards: list[list[Source]] = []
    for kind, same in itertools.groupby(sources, lambda source: source.kind):
        if kind == "tar":
            shards += [[source] for source in same]
        elif kind == "file":
            files = list(same)
            shards += [files[i : i + clips_per_shard] for i in range(0, len(files), clips_per_shard)]
        else:
            shards += [
                [source._replace(first=i, end=min(i + clips_per_shard, source.end))]
                for source in same
                for i in range(0, source.end, clips_per_shard)
            ]
    return shards


def planned_clips(source: Source) -> int:
    """How many clips a source has, if it is no tar."""
    return 1 if source.kind == "file" else source.end - source.first


def digest(shards: Sequence[Sequence[Source]]) -> str:
    """A hash of the plan."""
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def to_parquet(shards: Sequence[Sequence[Source]]) -> bytes:
    """The plan as a table, one row a source."""
    # The names of files as bytes: they need not be UTF-8.
    rows = [
        {"shard": i} | source._asdict() | {"file": os.fsencode(source.file)}
        for i, sources in enumerate(shards)
        for source in sources
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def from_parquet(content: bytes) -> list[list[Source]]:
    """`to_parquet`'s inverse; raises CorpusError for what it did not make."""
    try:
        rows = pq.read_table(io.BytesIO(content), page_checksum_verification=True).to_pylist()
        by_shard = itertools.groupby(rows, lambda row: row.pop("shard"))
        return [[Source(**row | {"file": os.fsdecode(row["file"])}) for row in group] for _, group in by_shard]
    except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
        raise CorpusError(f"the plan is damaged: {error}") from None


def _sources(argument: str) -> list[Source]:
    files = list(find_files(argument, (*audio.SUFFIXES, TABLE, TAR)))
    sources = [source for file in files for source in _sources_of_file(*file)]
    if not sources:
        raise CorpusError(f"no clips in {argument}: {len(files)} files were looked at.")
    return sources


def _sources_of_file(file: str, name: str, size: int) -> Iterator[Source]:
    suffix, name = posixpath.splitext(name)[1].lower(), escaped(name)
    if suffix == TAR:
        yield Source("tar", file, name.removesuffix(TAR), bytes=size)
    elif suffix == TABLE:
        system, path = open_fs(file)
        with system.open(path, "rb") as opened:
            try:
                table = pq.ParquetFile(opened)
                columns = table_columns(table.schema_arrow)
                if not 0 <= table.metadata.num_rows <= size:  # a footer may promise any number
                    raise CorpusError(f"promises {table.metadata.num_rows} rows in {size} bytes.")
                if columns.audio is not None:
                    yield Source("rows", file, name.removesuffix(TABLE), end=table.metadata.num_rows, bytes=size)
                    return
                rows = table.read([column for column in (columns.path, columns.id) if column]).to_pylist()
            except CorpusError as error:
                raise CorpusError(f"{file}: {error}") from None
            except (pa.ArrowException, OSError, ValueError) as error:
                if getattr(error, "errno", None):  # the disk's: Arrow's own about damage have no number
                    raise
                raise CorpusError(f"{file} can't be read as Parquet: {error}") from None
        yield from _listed(file, rows)
    elif suffix in (".jsonl", ".csv"):
        system, path = open_fs(file)
        with system.open(path, "rb") as opened, io.TextIOWrapper(opened, encoding="utf-8", newline="") as text:
            try:
                lines = csv.DictReader(text, strict=True) if suffix == ".csv" else map(json_text.parse, text)
                yield from _listed(file, lines)
            except CorpusError:
                raise
            except (csv.Error, ValueError) as error:
                raise CorpusError(f"{file} can't be read as {suffix[1:]}: {error}") from None
    else:
        yield Source("file", file, name, bytes=size)


def _listed(manifest: str, rows: Iterable[Any]) -> Iterator[Source]:
    """The clips that a manifest lists."""
    folder = posixpath.dirname(manifest)
    for number, row in enumerate(rows, start=1):
        where = f"{manifest}, clip {number}"
        if not isinstance(row, dict):
            raise CorpusError(f"{where}: is {row!r:.100}, not an object with a path in it.")
        path = _first(row, PATH_COLUMNS)
        if not path or not isinstance(path, str):
            raise CorpusError(f"{where}: has no path; it would be in one of {', '.join(PATH_COLUMNS)}.")
        try:
            file = resolve_path(folder, path)
        except CorpusError as error:
            raise CorpusError(f"{where}: {error}") from None
        yield Source("file", file, escaped(str(_first(row, ID_COLUMNS) or path)))


def _first(row: dict[str, Any], columns: Sequence[str]) -> Any:
    return next((row[column] for column in columns if column in row), None)


class TableColumns(NamedTuple):
    """The columns of a table that say what a clip is; of `audio`, where its bytes and its path are in each value."""

    audio: str | None
    path: str | None
    id: str | None


def table_columns(schema: pa.Schema) -> TableColumns:
    """The columns of a table: `audio` has bytes, or is a struct of bytes and path, as Hugging Face's datasets write it.

    Raises:
        CorpusError: if there is neither audio nor a path.
    """
    with_audio = [
        field.name
        for field in schema
        if pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and {"bytes", "path"} <= {inner.name for inner in field.type})
    ]
    path, key = (next((c for c in some if c in schema.names), None) for some in (PATH_COLUMNS, ID_COLUMNS))
    if len(with_audio) > 1 or not (with_audio or path):
        columns = [f"{field.name}: {field.type}" for field in schema]
        raise CorpusError(
            f"a table must have one column with audio, or one of {', '.join(PATH_COLUMNS)} with paths; "
            f"this one has {columns!r:.1000}."
        )
    return TableColumns(with_audio[0] if with_audio else None, path, key)
