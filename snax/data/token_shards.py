"""Random access to the rows of token shards that `snax extract` wrote. A data source for Grain and torch."""

import bisect
import functools
import hashlib
import io
import itertools
import operator
import os
import posixpath
import sys
from typing import Any, SupportsIndex

from .. import extras, json_text

# Cache sizes. A row group is 0.4 MB for 256 rows of ten seconds at 24 kHz. The metadata of a file is 20 kB.
CACHED_ROW_GROUPS, CACHED_FILES = 64, 4096
_REPAIR_HINT = "Run `snax extract` again to rebuild it."


def open_tokens(path: str | os.PathLike[str]) -> "TokenSource":
    """Open the shards of a finished extraction for random access to their rows.

    A row is a dict:

    - `id`: the id of the clip.
    - `channel`: the index of the channel.
    - `codes`: a uint16 array (frames / stride,) for each level, coarse to fine.
    - `tokens`: an int32 array, if the extraction was run with `--tokens`.
    - `num_samples`, `sample_rate`: of the audio.
    - `source`, `member`: the file of the clip, and its row or name in that file.

    Args:
        path: the folder or URL of the extraction.

    Returns:
        A sequence with `len(source)` and `source[i]`, in the order of the corpus. It can be pickled, and is safe to use
        from several threads.

    Raises:
        ValueError: if there is no finished extraction, or it is corrupt. A corrupt shard raises when it is read: its
            SHA-256 is checked on first use, and page checksums are checked on every read.
        ImportError: if pyarrow is not installed. It is part of the extra `extract`.
    """
    return TokenSource(os.fspath(path))


class TokenSource:
    """The result of `open_tokens`."""

    def __init__(self, url: str):
        try:
            import pyarrow  # noqa: F401  # to fail here and not at the first row
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise extras.missing(error, "extract") from error
        self.url = url
        self._system, self._root = url_to_fs(url)
        try:
            summary = json_text.parse(self._system.cat_file(posixpath.join(self._root, "_SUCCESS")))
            self._hashes = [str(shard["sha256"]) for shard in summary["shards"]]
            counts = [int(shard["rows"]) for shard in summary["shards"]]
            if min(counts, default=0) < 0 or sum(counts) > sys.maxsize:
                raise ValueError(f"invalid numbers of rows: {counts!r:.200}.")
            self._ends = list(itertools.accumulate(counts))
        except FileNotFoundError:
            raise ValueError(
                f"{url} has no _SUCCESS file, so its extraction is not finished. Run `snax extract` again to resume it."
            ) from None
        except (KeyError, OverflowError, TypeError, ValueError) as error:  # OverflowError: an infinite count
            raise ValueError(f"{url}/_SUCCESS is corrupt: {error}") from None
        self._init_caches()

    def _init_caches(self) -> None:
        self._verified: set[int] = set()
        self._file = functools.lru_cache(CACHED_FILES)(self._open)
        self._group = functools.lru_cache(CACHED_ROW_GROUPS)(self._read)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_file", "_group", "_verified")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._init_caches()

    def __repr__(self) -> str:
        return f"TokenSource({self.url!r}, {len(self)} rows in {len(self._ends)} shards)"

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} is out of range for {len(self)} rows.")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        groups = self._file(shard)[1]
        group = bisect.bisect_right(groups, row)
        columns = self._group(shard, group)
        row -= groups[group - 1] if group else 0
        record = {name: column[row] for name, column in columns.items()}
        levels = [name for name in record if name.startswith("codes_")]
        return record | {"codes": tuple(record.pop(level) for level in levels)}

    def _open(self, shard: int) -> tuple[Any, list[int]]:
        """Return the metadata of a shard and the end row of each row group."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        name = self._name(shard)
        try:
            if shard in self._verified:
                with self._system.open(name, "rb") as file:
                    metadata = pq.read_metadata(file)
            else:
                content = self._system.cat_file(name)
                if hashlib.sha256(content).hexdigest() != self._hashes[shard]:
                    raise ValueError(f"{name} is corrupt: its SHA-256 has changed. {_REPAIR_HINT}")
                metadata = pq.read_metadata(io.BytesIO(content))
                self._verified.add(shard)
        except FileNotFoundError:
            raise ValueError(f"{name} is missing. {_REPAIR_HINT}") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None):  # from the file system; Arrow's errors for corrupt data have no errno
                raise
            raise ValueError(f"{name} cannot be read: {error} {_REPAIR_HINT}") from error
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return metadata, list(itertools.accumulate(counts))

    def _read(self, shard: int, group: int) -> dict[str, Any]:
        """Return the columns of a row group: for each row, a value or an array."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self._system.open(self._name(shard), "rb") as file:
                metadata = self._file(shard)[0]
                table = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True).read_row_group(group)
            return {name: _items(table[name].combine_chunks()) for name in table.column_names}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self._name(shard)} cannot be read: {error} {_REPAIR_HINT}") from error

    def _name(self, shard: int) -> str:
        return posixpath.join(self._root, f"tokens-{shard:05}-of-{len(self._ends):05}.parquet")


def _items(column: Any) -> list[Any]:
    """Return the values of an Arrow column, with lists as NumPy arrays."""
    import pyarrow as pa

    if pa.types.is_list(column.type):
        ends, values = column.offsets.to_numpy(), column.values.to_numpy()
        return [values[begin:end] for begin, end in itertools.pairwise(ends)]
    items: list[Any] = column.to_pylist()
    return items
