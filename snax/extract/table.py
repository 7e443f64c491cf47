"""Conversion of a shard's rows to Parquet."""

import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..codec.config import SNACConfig
from ..data.reading import Clip
from ..inference.packing import EncodedClip
from ..tokens import token_layout

# Random access to a row reads its whole row group: about 200 kB, in 2 ms.
ROWS_PER_GROUP = 256


class Row(NamedTuple):
    """The codes of one channel of a clip."""

    clip: Clip
    channel: int
    encoded: EncodedClip


def to_parquet(rows: Sequence[Row], config: SNACConfig, tokens: str | None, made_with: dict[str, Any]) -> bytes:
    """Return the content of a shard's Parquet file.

    The bytes depend only on the arguments. Each page has a checksum.

    Args:
        rows: the rows.
        config: the configuration of the codec.
        tokens: name of the layout of a `tokens` column, see `token_layout`. None for no such column.
        made_with: metadata that is stored in the schema under the key "snax".
    """
    columns = {
        "id": pa.array([row.clip.id for row in rows], pa.string()),
        "channel": pa.array([row.channel for row in rows], pa.uint16()),
    }
    for level in range(len(config.vq_strides)):
        columns[f"codes_{level}"] = _lists([row.encoded.codes[level] for row in rows], np.uint16)
    if tokens is not None:
        layout = token_layout(tokens, config)
        columns["tokens"] = _lists(
            [layout.flatten([np.asarray(codes)[None] for codes in row.encoded.codes])[0] for row in rows], np.int32
        )
    columns |= {
        "num_samples": pa.array([row.encoded.samples for row in rows], pa.int64()),
        "sample_rate": pa.array([config.sampling_rate] * len(rows), pa.int32()),
        "source": pa.array([row.clip.source for row in rows], pa.string()),
        "member": pa.array([row.clip.member for row in rows], pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata({"snax": json.dumps(made_with)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=ROWS_PER_GROUP, write_page_checksum=True)
    return sink.getvalue()


def _lists(arrays: Sequence[Any], dtype: type[np.generic]) -> pa.ListArray:
    """Return a list column with one array per row."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype, casting="unsafe")
    return pa.ListArray.from_arrays(offsets, pa.array(values))
