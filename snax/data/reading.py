"""Read the clips of a source. Clips that cannot be read are not skipped: they come with the reason."""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from . import audio
from .corpus import CorpusError, Source, escape_name, resolve_path, table_columns
from .files import open_fs

# The maximum size of a clip in a tar. A corrupt header can declare any size.
MAX_BYTES = 4 * 2**30


class Clip(NamedTuple):
    """The identity of a clip.

    Attributes:
        id: unique in a corpus.
        source: path or URL of the file that contains the clip.
        member: the row of a table or the name in a tar. None for an audio file.
    """

    id: str
    source: str
    member: str | None = None


class Unreadable(NamedTuple):
    """The reason why a clip cannot be read or decoded."""

    reason: str


# The bytes of a clip, or the path or URL of a file with them.
Content = bytes | str | Unreadable


def clips(source: Source) -> Iterator[tuple[Clip, Content]]:
    """Yield the clips of a source and their contents.

    The content of a clip that is missing or corrupt is `Unreadable`.

    Raises:
        OSError: if reading fails for another reason, such as a permission or network error.
    """
    if source.kind == "file":
        yield Clip(source.id, escape_name(source.file)), source.file
        return
    try:
        system, path = open_fs(source.file)
        with system.open(path, "rb") as file:
            yield from _table_clips(file, source) if source.kind == "rows" else _tar_clips(file, source)
    except FileNotFoundError:
        yield Clip(source.id, escape_name(source.file)), Unreadable("the file no longer exists.")


def _table_clips(file: BinaryIO, source: Source) -> Iterator[tuple[Clip, Content]]:
    row, file_name = source.first, escape_name(source.file)
    folder = posixpath.dirname(source.file)
    try:
        table = pq.ParquetFile(file, page_checksum_verification=True)
        columns = table_columns(table.schema_arrow)
        for batch in _row_batches(table, source, [column for column in columns if column]):
            for values in batch.to_pylist():
                key = values.get(columns.id)
                clip = Clip(f"{source.id}/{row}" if key is None else str(key), file_name, str(row))
                yield clip, _row_content(values[columns.audio], values.get(columns.path), folder)
                row += 1
        reason = "the table has fewer rows than when the plan was made."
    except (pa.ArrowException, CorpusError, UnicodeDecodeError) as error:
        reason = f"the table is corrupt: {error}"
    except OSError as error:
        if error.errno:  # from the operating system; Arrow also raises OSError for corrupt data, but without errno
            raise
        reason = f"the table is corrupt: {error}"
    for missing in range(row, source.end):
        yield Clip(f"{source.id}/{missing}", file_name, str(missing)), Unreadable(reason)


def _row_batches(table: pq.ParquetFile, source: Source, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a source in small batches, because a row with ten minutes of audio is a hundred megabytes."""
    begin = 0
    for group in range(table.num_row_groups):
        end = begin + table.metadata.row_group(group).num_rows
        if begin < source.end and end > source.first:
            offset = begin
            for batch in table.iter_batches(batch_size=16, row_groups=[group], columns=columns):
                skip = min(max(0, source.first - offset), len(batch))
                yield batch.slice(skip, max(0, min(len(batch), source.end - offset) - skip))
                offset += len(batch)
        begin = end


def _row_content(value: object, path: str | None, folder: str) -> Content:
    """Return the bytes of a clip in a table, or the path if the table has no bytes."""
    if isinstance(value, dict):
        path = value["path"] or path
        value = value["bytes"]
    if isinstance(value, bytes):
        return value
    if not path:
        return Unreadable("the row has neither audio bytes nor a path.")
    try:
        return resolve_path(folder, path)
    except CorpusError as error:
        return Unreadable(str(error))


def _tar_clips(file: BinaryIO, source: Source) -> Iterator[tuple[Clip, Content]]:
    """Yield the audio in a tar. Members are streamed and never extracted, so their names cannot overwrite files."""
    problem, file_name = None, escape_name(source.file)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # Keeps memory constant: tarfile remembers all members.
                tar.members = []  # type: ignore[attr-defined]  # missing in the stubs
                if not member.name.lower().endswith(audio.SUFFIXES) or member.isdir():
                    continue
                # In a WebDataset, the key of a sample is the name up to its first dot.
                path = escape_name(member.name)
                folder, name = posixpath.split(path)
                clip = Clip(posixpath.join(folder, name.partition(".")[0]), file_name, path)
                if not member.isreg() or member.issparse():
                    yield clip, Unreadable("not a regular file but, for example, a link or a device.")
                elif member.size > MAX_BYTES:
                    yield clip, Unreadable(f"the size of {member.size} bytes exceeds the limit of {MAX_BYTES} bytes.")
                else:
                    content = tar.extractfile(member)
                    yield clip, content.read() if content else Unreadable("the file is empty.")
            # tarfile also stops at a corrupt header, without an error. A complete tar ends with blocks of zeros.
            file.seek(tar.offset)
            end_blocks = file.read(2 * tarfile.BLOCKSIZE)
            if len(end_blocks) < tarfile.BLOCKSIZE or any(end_blocks):
                problem = f"neither a member nor the end of the archive follows at byte {tar.offset}."
    except tarfile.TarError as error:
        problem = str(error)
    if problem is not None:
        yield Clip(source.id, file_name), Unreadable(f"the tar is corrupt, and all later members are lost: {problem}")
