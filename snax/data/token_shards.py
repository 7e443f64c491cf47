"""The shards that `snax extract` wrote, row by row: a data source for Grain, or a dataset for torch."""

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

# Groups of rows that are kept, 0.4 MB for 256 rows of ten seconds at 24 kHz; and what is known of files, 20 kB each.
GROUPS_KEPT, FILES_KEPT = 64, 4096
MEND = "`snax extract`, run again, makes it anew."


def open_tokens(path: str | os.PathLike[str]) -> "TokenSource":
    """The rows of all shards in a folder or at a URL, in their order, for random access.

    Each is a dict: `id`; `channel`; `codes`, a uint16 array (frames / stride,) for each level, coarse to fine;
    `tokens`, an int32 array, if the extraction was asked for them; `num_samples` and `sample_rate` of the audio that
    they stand for; `source` and `member`, where that came from.

    Raises:
        ValueError: if there is no finished extraction, or it is damaged. Damage to a shard raises when it is read: its
            hash is checked the first time, and the checksum of each page every time.
        ImportError: without `snax-codec[extract]`.
    """
    return TokenSource(os.fspath(path))


class TokenSource:
    """What `open_tokens` gives: `len(source)`, `source[i]`. May be pickled, and read by several threads at once."""

    def __init__(self, url: str):
        try:
            import pyarrow  # noqa: F401  # missing, it should be missed here and not at the first row
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise extras.missing(error, "extract") from error
        self.url = url
        self._system, self._root = url_to_fs(url)
        try:
            finished = json_text.parse(self._system.cat_file(posixpath.join(self._root, "_SUCCESS")))
            self._hashes = [str(shard["sha256"]) for shard in finished["shards"]]
            counts = [int(shard["rows"]) for shard in finished["shards"]]
            if min(counts, default=0) < 0 or sum(counts) > sys.maxsize:
                raise ValueError(f"there are no shards of {counts!r:.200} rows.")
            self._ends = list(itertools.accumulate(counts))
        except FileNotFoundError:
            raise ValueError(
                f"{url} has no _SUCCESS: no extraction was finished there. Run `snax extract` again to go on."
            ) from None
        except (KeyError, OverflowError, TypeError, ValueError) as error:  # the second: of a count that is infinite
            raise ValueError(f"{url}/_SUCCESS is damaged: {error}") from None
        self._forget()

    def _forget(self) -> None:
        self._verified: set[int] = set()
        self._file = functools.lru_cache(FILES_KEPT)(self._open)
        self._group = functools.lru_cache(GROUPS_KEPT)(self._read)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_file", "_group", "_verified")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __repr__(self) -> str:
        return f"TokenSource({self.url!r}, {len(self)} rows in {len(self._ends)} shards)"

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
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
        """A shard's metadata, and the row at which each of its groups ends."""
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
                    raise ValueError(f"{name} is damaged. {MEND}")
                metadata = pq.read_metadata(io.BytesIO(content))
                self._verified.add(shard)
        except FileNotFoundError:
            raise ValueError(f"{name} is missing. {MEND}") from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None):  # the disk's: Arrow's own about damage have no number
                raise
            raise ValueError(f"{name} can't be read: {error} {MEND}") from error
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return metadata, list(itertools.accumulate(counts))

    def _read(self, shard: int, group: int) -> dict[str, Any]:
        """The columns of a group of rows, lists as arrays of each row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with self._system.open(self._name(shard), "rb") as file:
                metadata = self._file(shard)[0]
                table = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True).read_row_group(group)
            return {name: _items(table[name].combine_chunks()) for name in table.column_names}
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self._name(shard)} can't be read: {error} {MEND}") from error

    def _name(self, shard: int) -> str:
        return posixpath.join(self._root, f"tokens-{shard:05}-of-{len(self._ends):05}.parquet")


def _items(column: Any) -> list[Any]:
    """What is in a column of Arrow's; lists as arrays."""
    import pyarrow as pa

    if pa.types.is_list(column.type):
        ends, values = column.offsets.to_numpy(), column.values.to_numpy()
        return [values[begin:end] for begin, end in itertools.pairwise(ends)]
    items: list[Any] = column.to_pylist()
    return items
