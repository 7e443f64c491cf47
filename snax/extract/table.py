"""The rows of a shard as Parquet."""

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
from ..tokens import ORPHEUS, TokenLayout

# Rows that are read together when one is asked for: some 200 kB, two milliseconds.
ROWS_PER_GROUP = 256
LAYOUTS = ("orpheus", "shared", "separate")


class Row(NamedTuple):
    """One channel of a clip."""

    clip: Clip
    channel: int
    encoded: EncodedClip


def token_layout(name: str, config: SNACConfig) -> TokenLayout:
    """The layout of a language model's tokens: Orpheus' ids, or ids from 0 on that slots share or have for themselves.

    Raises:
        ValueError: for Orpheus with a codec that is not like snac_24khz.
    """
    if name == "orpheus":
        if (config.vq_strides, config.codebook_size) != (ORPHEUS.vq_strides, ORPHEUS.codebook_size):
            raise ValueError(
                f"Orpheus' tokens are for strides {ORPHEUS.vq_strides} and {ORPHEUS.codebook_size} codes; this model "
                f"has {config.vq_strides} and {config.codebook_size}."
            )
        return ORPHEUS
    step = {"shared": 0, "separate": config.codebook_size}[name]
    return TokenLayout(config.vq_strides, config.codebook_size, slot_step=step)


def to_parquet(rows: Sequence[Row], config: SNACConfig, tokens: str | None, made_with: dict[str, Any]) -> bytes:
    """The file's content: the same for the same rows, whoever writes it. Each page has its checksum."""
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
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    values = np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype, casting="unsafe")
    return pa.ListArray.from_arrays(ends, pa.array(values))
