"""From the sources of a plan to the clips in them. What can't be read is not left out: it comes with the reason."""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from . import audio
from .corpus import CorpusError, Source, escaped, resolve_path, table_columns
from .files import open_fs

# Of one clip inside a tar, whose header may promise anything.
MAX_BYTES = 4 * 2**30


class Clip(NamedTuple):
    """What a clip is called and where it is: in a file, and where the file has several, which of them."""

    id: str
    source: str
    member: str | None = None


class Unreadable(NamedTuple):
    """Why a clip can't be had."""

    reason: str


# A clip's bytes, or the path or URL where they are.
Content = bytes | str | Unreadable


def clips(source: Source) -> Iterator[tuple[Clip, Content]]:
    """The clips of a source, each with its bytes, or where they are.

    Raises:
        OSError: for what can't be read at all; what is there but damaged is `Unreadable`.
    """
    if source.kind == "file":
        yield Clip(source.id, escaped(source.file)), source.file
        return
    try:
        system, path = open_fs(source.file)
        with system.open(path, "rb") as file:
            yield from _in_table(file, source) if source.kind == "rows" else _in_tar(file, source)
    except FileNotFoundError:
        yield Clip(source.id, escaped(source.file)), Unreadable("is not there any more.")


def _in_table(file: BinaryIO, source: Source) -> Iterator[tuple[Clip, Content]]:
    row, file_name = source.first, escaped(source.file)
    folder = posixpath.dirname(source.file)
    try:
        table = pq.ParquetFile(file, page_checksum_verification=True)
        columns = table_columns(table.schema_arrow)
        for batch in _rows(table, source, [column for column in columns if column]):
            for values in batch.to_pylist():
                key = values.get(columns.id)
                clip = Clip(f"{source.id}/{row}" if key is None else str(key), file_name, str(row))
                yield clip, _content(values[columns.audio], values.get(columns.path), folder)
                row += 1
        reason = "the table has fewer rows than it had when the plan was made."
    except (pa.ArrowException, CorpusError, UnicodeDecodeError) as error:
        reason = f"its table is damaged: {error}"
    except OSError as error:
        if error.errno:  # the operating system's; Arrow raises its own about damage as OSError too, without a number
            raise
        reason = f"its table is damaged: {error}"
    for missing in range(row, source.end):
        yield Clip(f"{source.id}/{missing}", file_name, str(missing)), Unreadable(reason)


def _rows(table: pq.ParquetFile, source: Source, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a source, a few at a time: a row of ten minutes of audio is a hundred megabytes."""
    begin = 0
    for group in range(table.num_row_groups):
        end = begin + table.metadata.row_group(group).num_rows
        if begin < source.end and end > source.first:
            at = begin
            for batch in table.iter_batches(batch_size=16, row_groups=[group], columns=columns):
                skip = min(max(0, source.first - at), len(batch))
                yield batch.slice(skip, max(0, min(len(batch), source.end - at) - skip))
                at += len(batch)
        begin = end


def _content(value: object, path: str | None, folder: str) -> Content:
    """A clip's bytes, or where they are if the table only says that."""
    if isinstance(value, dict):
        path = value["path"] or path
        value = value["bytes"]
    if isinstance(value, bytes):
        return value
    if not path:
        return Unreadable("its row has neither bytes nor a path.")
    try:
        return resolve_path(folder, path)
    except CorpusError as error:
        return Unreadable(str(error))


def _in_tar(file: BinaryIO, source: Source) -> Iterator[tuple[Clip, Content]]:
    """The audio in a tar. Its members are streamed, never extracted: what they are called says nothing of our disk."""
    damage, file_name = None, escaped(source.file)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # It would grow with the tar.
                tar.members = []  # type: ignore[attr-defined]  # the stubs leave this attribute out
                if not member.name.lower().endswith(audio.SUFFIXES) or member.isdir():
                    continue
                # WebDataset: what stands before the first dot of the name is the sample's key.
                path = escaped(member.name)
                folder, name = posixpath.split(path)
                clip = Clip(posixpath.join(folder, name.partition(".")[0]), file_name, path)
                if not member.isreg() or member.issparse():
                    yield clip, Unreadable("is a link or something else that is no regular file.")
                elif member.size > MAX_BYTES:
                    yield clip, Unreadable(f"is {member.size} bytes large, more than {MAX_BYTES}.")
                else:
                    content = tar.extractfile(member)
                    yield clip, content.read() if content else Unreadable("is empty.")
            # A header that is damaged ends the iteration like the end of the tar, which is blocks of zeros.
            file.seek(tar.offset)
            rest = file.read(2 * tarfile.BLOCKSIZE)
            if len(rest) < tarfile.BLOCKSIZE or any(rest):
                damage = f"after byte {tar.offset} there is neither another file nor the tar's end."
    except tarfile.TarError as error:
        damage = str(error)
    if damage is not None:
        yield Clip(source.id, file_name), Unreadable(f"the tar is damaged, and what comes after is lost: {damage}")
