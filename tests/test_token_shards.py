"""Shards read back: row by row, by Grain, by torch, by pyarrow, and damaged."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import grain
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import corpora, small

import snax
from snax.data import audio
from snax.extract import table
from snax.extract.run import ExtractConfig, extract
from snax.tokens import TokenLayout


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 clips, the last of which can't be read, in shards of seven rows that are read two at a time."""
    folder = tmp_path_factory.mktemp("tokens")
    clips = corpora.clips(20) | {"zz.wav": b"bad"}
    corpora.folder(folder / "corpus", clips)
    with mock.patch.object(table, "ROWS_PER_GROUP", 2):
        job = ExtractConfig(
            [str(folder / "corpus")], str(folder / "out"), "small", clips_per_shard=7, tokens="shared", num_workers=2
        )
        extract(small.model(), job)
    return folder / "out"


def test_every_row(shards: Path) -> None:
    source = snax.open_tokens(shards)
    rows = [row for path in sorted(shards.glob("tokens-*")) for row in pq.read_table(path).to_pylist()]
    assert len(source) == len(rows) == 20
    heard = [audio.read(row["source"], small.CONFIG.sampling_rate)[0] for row in rows]
    encoded = list(snax.encode_many(small.model(), heard))
    for index in np.random.default_rng(0).permutation(20):  # in no order
        found, expected = source[index], rows[index]
        for level, codes in enumerate(encoded[index].codes):
            assert found["codes"][level].dtype == np.uint16
            np.testing.assert_array_equal(found["codes"][level], codes)
            assert expected.pop(f"codes_{level}") == found["codes"][level].tolist()
        assert found.pop("tokens").tolist() == expected.pop("tokens")
        del found["codes"]
        assert found == expected
    assert source[-1]["id"] == source[19]["id"]
    with pytest.raises(IndexError, match="row 20 of 20"):
        source[20]


def test_threads_and_other_processes(shards: Path) -> None:
    source = snax.open_tokens(shards)
    ids = [row["id"] for row in source]
    with ThreadPoolExecutor(8) as threads:
        assert [row["id"] for row in threads.map(source.__getitem__, [*range(20)] * 20)] == ids * 20
    assert [row["id"] for row in pickle.loads(pickle.dumps(source))] == ids


def test_grain_and_torch(shards: Path) -> None:
    source = snax.open_tokens(shards)
    layout = TokenLayout(small.CONFIG.vq_strides, small.CONFIG.codebook_size)

    def tokens(row: dict[str, object]) -> np.ndarray:
        return layout.flatten([level[None] for level in row["codes"]])[0]

    dataset = grain.MapDataset.source(source).shuffle(seed=0).map(tokens)
    assert sorted(map(len, dataset)) == sorted(len(row["tokens"]) for row in source)
    loader = torch.utils.data.DataLoader(source, batch_size=5, collate_fn=lambda rows: [row["tokens"] for row in rows])
    batches = list(loader)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5]
    np.testing.assert_array_equal(batches[3][4], source[19]["tokens"])


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    for path in shards.glob("*"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_any_flipped_bit_is_seen(copied: Path) -> None:
    path = copied / "tokens-00001-of-00003.parquet"
    whole = path.read_bytes()
    for at in range(0, len(whole), len(whole) // 200):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        source = snax.open_tokens(copied)
        assert source[0]["id"], "the other shards can be read"
        with pytest.raises(ValueError, match="tokens-00001-of-00003.parquet is damaged. `snax extract`, run again"):
            source[7]


def test_a_shard_that_is_damaged_later(copied: Path) -> None:
    """Then its pages are checked, and nothing else is read again."""
    path = copied / "tokens-00001-of-00003.parquet"
    whole = path.read_bytes()
    source = snax.open_tokens(copied)
    assert source[7]["id"]  # of the first group of rows
    expected = snax.open_tokens(copied)[13]
    metadata = pq.read_metadata(path).row_group(3)
    begins = [metadata.column(i).dictionary_page_offset or metadata.column(i).data_page_offset for i in range(5)]
    for i, begin in enumerate(begins):
        at = begin + metadata.column(i).total_compressed_size - 1
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="tokens-00001-of-00003.parquet can't be read: "):
            source[13]
    path.write_bytes(whole)
    np.testing.assert_equal(source[13], expected)


def test_what_is_no_extraction(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no _SUCCESS: no extraction was finished there"):
        snax.open_tokens(tmp_path / "nothing")
    (copied / "tokens-00002-of-00003.parquet").unlink()
    source = snax.open_tokens(copied)
    with pytest.raises(ValueError, match="tokens-00002-of-00003.parquet is missing. `snax extract`, run"):
        source[19]
    os.truncate(copied / "_SUCCESS", 20)
    with pytest.raises(ValueError, match="_SUCCESS is damaged"):
        snax.open_tokens(copied)
