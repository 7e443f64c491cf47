"""Find the clips of a corpus and assign them to shards. The plan depends only on the inputs.

Inputs are local paths or fsspec URLs (gs://, s3://).
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

# The columns of a clip's path and id in manifests and tables. The first existing column is used.
PATH_COLUMNS = ("path", "audio_filepath", "audio_path", "file", "url")
ID_COLUMNS = ("id", "key", "utt_id")
TABLE, TAR = ".parquet", ".tar"
# URL schemes that a manifest may use, besides its own. Other schemes of fsspec are rejected, because some read local
# files, and some unpack or cache what they download.
ALLOWED_SCHEMES = frozenset({"abfs", "abfss", "az", "gcs", "gs", "hf", "http", "https", "s3", "s3a"})


class Source(NamedTuple):
    """A group of clips: one audio file, a range of rows of a table with audio, or a tar.

    A tar is always one shard: it must be read from its beginning, and the number of its clips is unknown until then.

    Attributes:
        kind: "file", "rows" or "tar".
        file: path or URL.
        id: of the clip, or the prefix of the ids of clips that have none.
        first: first row.
        end: row after the last.
        bytes: size of the file when the plan was made, or -1 if that would have needed another request.
    """

    kind: str
    file: str
    id: str
    first: int = 0
    end: int = 0
    bytes: int = -1


def resolve_path(folder: str, path: str) -> str:
    """Resolve the path of a clip in a manifest or table.

    Args:
        folder: path or URL of the folder of the manifest.
        path: relative to `folder`, an absolute path, or a URL.

    Raises:
        CorpusError: if an untrusted manifest must not refer to `path`: a local file in a remote manifest, a scheme
            other than ALLOWED_SCHEMES, or chained URLs. Also if `path` is not a valid file name.
    """
    scheme, is_url, _ = path.partition("://")
    folder_scheme, is_remote, _ = folder.partition("://")
    if is_url and (scheme not in ALLOWED_SCHEMES | {folder_scheme if is_remote else "file"} or "::" in path):
        schemes = ", ".join(sorted(ALLOWED_SCHEMES))
        raise CorpusError(f"{path!r:.200} is not an allowed URL in a manifest. Allowed schemes: {schemes}.")
    if is_remote and not is_url and posixpath.isabs(path):
        raise CorpusError(f"{path!r:.200} is a local file, which a remote manifest cannot refer to.")
    try:
        if b"\0" not in os.fsencode(path):
            return path if is_url else posixpath.join(folder, path)
    except UnicodeEncodeError:  # an unpaired surrogate, which JSON can contain
        pass
    raise CorpusError(f"{path!r:.200} is not a valid file name.")


def escape_name(name: str) -> str:
    """Make a file name valid UTF-8: in a name that is not UTF-8, the byte 255 becomes `\\udcff`."""
    return name.encode("utf-8", "backslashreplace").decode()


class CorpusError(ValueError):
    """Raised for invalid inputs."""


def plan(inputs: Iterable[str], clips_per_shard: int) -> list[list[Source]]:
    """Find all clips and divide them into shards.

    Args:
        inputs: files, glob patterns and folders, as paths or URLs. A file is audio, a manifest (.jsonl, .csv, or
            .parquet with paths, which may be relative to the manifest), a table with audio bytes (.parquet, in the
            format of Hugging Face datasets), or a WebDataset tar. In folders, audio files, tables and tars are found by
            their suffix.
        clips_per_shard: maximum number of clips in a shard. A tar is always one shard.

    Returns:
        The sources of each shard.

    Raises:
        CorpusError: if an input has no clips or is invalid, or if two clips have the same id.
        OSError: if an input cannot be read.
    """
    sources = [source for argument in inputs for source in _sources(argument)]
    ids: dict[str, str] = {}
    for source in sources:
        if source.kind == "file":
            if source.id in ids:
                raise CorpusError(
                    f"two clips have the same id, {source.id}: {ids[source.id]} and {source.file}. Pass a folder that "
                    "contains both, or a manifest with unique ids."
                )
            ids[source.id] = source.file
    return shards_of(sources, clips_per_shard)


def shards_of(sources: Iterable[Source], clips_per_shard: int) -> list[list[Source]]:
    """Divide sources into shards, in order. The sources of a shard have the same kind."""
    shards: list[list[Source]] = []
    for kind, group in itertools.groupby(sources, lambda source: source.kind):
        if kind == "tar":
            shards += [[source] for source in group]
        elif kind == "file":
            files = list(group)
            shards += [files[i : i + clips_per_shard] for i in range(0, len(files), clips_per_shard)]
        else:
            shards += [
                [source._replace(first=i, end=min(i + clips_per_shard, source.end))]
                for source in group
                for i in range(0, source.end, clips_per_shard)
            ]
    return shards


def planned_clips(source: Source) -> int:
    """Return the number of clips of a file or of rows. Tars are not supported."""
    return 1 if source.kind == "file" else source.end - source.first


def count_clips(shards: Sequence[Sequence[Source]]) -> int | None:
    """Return the number of clips of shards, or None if there is a tar, whose clips are not known before it is read."""
    sources = [source for shard in shards for source in shard]
    return None if any(source.kind == "tar" for source in sources) else sum(map(planned_clips, sources))


def digest(shards: Sequence[Sequence[Source]]) -> str:
    """Return the SHA-256 of a plan, in hexadecimal."""
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def to_parquet(shards: Sequence[Sequence[Source]]) -> bytes:
    """Write a plan as a Parquet table with one row for each source."""
    # File names are stored as bytes, because they may not be UTF-8.
    rows = [
        {"shard": i} | source._asdict() | {"file": os.fsencode(source.file)}
        for i, sources in enumerate(shards)
        for source in sources
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def from_parquet(content: bytes) -> list[list[Source]]:
    """Read a plan that `to_parquet` wrote. Raise CorpusError if it is corrupt."""
    try:
        rows = pq.read_table(io.BytesIO(content), page_checksum_verification=True).to_pylist()
        by_shard = itertools.groupby(rows, lambda row: row.pop("shard"))
        return [[Source(**row | {"file": os.fsdecode(row["file"])}) for row in group] for _, group in by_shard]
    except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
        raise CorpusError(f"the plan is corrupt: {error}") from None


def _sources(argument: str) -> list[Source]:
    files = list(find_files(argument, (*audio.SUFFIXES, TABLE, TAR)))
    sources = [source for file in files for source in _sources_of_file(*file)]
    if not sources:
        raise CorpusError(f"found no clips in {argument} ({len(files)} files examined).")
    return sources


def _sources_of_file(file: str, name: str, size: int) -> Iterator[Source]:
    suffix, name = posixpath.splitext(name)[1].lower(), escape_name(name)
    if suffix == TAR:
        yield Source("tar", file, name.removesuffix(TAR), bytes=size)
    elif suffix == TABLE:
        system, path = open_fs(file)
        with system.open(path, "rb") as opened:
            try:
                table = pq.ParquetFile(opened)
                columns = table_columns(table.schema_arrow)
                if not 0 <= table.metadata.num_rows <= size:  # a corrupt footer can have any count
                    raise CorpusError(f"its footer declares {table.metadata.num_rows} rows in {size} bytes.")
                if columns.audio is not None:
                    yield Source("rows", file, name.removesuffix(TABLE), end=table.metadata.num_rows, bytes=size)
                    return
                rows = table.read([column for column in (columns.path, columns.id) if column]).to_pylist()
            except CorpusError as error:
                raise CorpusError(f"{file}: {error}") from None
            except (pa.ArrowException, OSError, ValueError) as error:
                if getattr(error, "errno", None):  # from the file system; Arrow's errors for corrupt data have no errno
                    raise
                raise CorpusError(f"{file} cannot be read as Parquet: {error}") from None
        yield from _manifest_sources(file, rows)
    elif suffix in (".jsonl", ".csv"):
        system, path = open_fs(file)
        with system.open(path, "rb") as opened, io.TextIOWrapper(opened, encoding="utf-8", newline="") as text:
            try:
                lines = csv.DictReader(text, strict=True) if suffix == ".csv" else map(json_text.parse, text)
                yield from _manifest_sources(file, lines)
            except CorpusError:
                raise
            except (csv.Error, ValueError) as error:
                raise CorpusError(f"{file} cannot be read as {suffix[1:]}: {error}") from None
    else:
        yield Source("file", file, name, bytes=size)


def _manifest_sources(manifest: str, rows: Iterable[Any]) -> Iterator[Source]:
    """Yield the clips of a manifest."""
    folder = posixpath.dirname(manifest)
    for number, row in enumerate(rows, start=1):
        location = f"{manifest}, clip {number}"
        if not isinstance(row, dict):
            raise CorpusError(f"{location}: expected an object with a path, got {row!r:.100}.")
        path = _first(row, PATH_COLUMNS)
        if not path or not isinstance(path, str):
            raise CorpusError(f"{location}: no path. Expected one of the fields {', '.join(PATH_COLUMNS)}.")
        try:
            file = resolve_path(folder, path)
        except CorpusError as error:
            raise CorpusError(f"{location}: {error}") from None
        yield Source("file", file, escape_name(str(_first(row, ID_COLUMNS) or path)))


def _first(row: dict[str, Any], columns: Sequence[str]) -> Any:
    return next((row[column] for column in columns if column in row), None)


class TableColumns(NamedTuple):
    """The names of the columns with a clip's audio, path and id. A column of audio may also contain paths."""

    audio: str | None
    path: str | None
    id: str | None


def table_columns(schema: pa.Schema) -> TableColumns:
    """Find the columns of a table.

    A column of audio contains bytes, or structs of bytes and path as in Hugging Face datasets.

    Raises:
        CorpusError: if there is neither audio nor a path, or more than one column with audio.
    """
    audio_columns = [
        field.name
        for field in schema
        if pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and {"bytes", "path"} <= {child.name for child in field.type})
    ]
    path, key = (next((c for c in names if c in schema.names), None) for names in (PATH_COLUMNS, ID_COLUMNS))
    if len(audio_columns) > 1 or not (audio_columns or path):
        columns = [f"{field.name}: {field.type}" for field in schema]
        raise CorpusError(
            f"a table must have one column with audio bytes, or paths in one of {', '.join(PATH_COLUMNS)}; "
            f"got {columns!r:.1000}."
        )
    return TableColumns(audio_columns[0] if audio_columns else None, path, key)
