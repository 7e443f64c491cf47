"""Token shards: random access, Grain and torch, and detection of corruption."""

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
from snax.extract.config import ExtractConfig
from snax.extract.run import extract
from snax.tokens import TokenLayout


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extract 20 clips and one unreadable clip to shards of seven clips with row groups of two rows."""
    folder = tmp_path_factory.mktemp("tokens")
    clips = corpora.clips(20) | {"zz.wav": b"bad"}
    corpora.folder(folder / "corpus", clips)
    with mock.patch.object(table, "ROWS_PER_GROUP", 2):
        config = ExtractConfig(
            [str(folder / "corpus")],
            out=str(folder / "out"),
            model="small",
            clips_per_shard=7,
            tokens="shared",
            num_decoders=2,
        )
        extract(small.model(), config)
    return folder / "out"


def test_every_row(shards: Path) -> None:
    source = snax.open_tokens(shards)
    rows = [row for path in sorted(shards.glob("tokens-*")) for row in pq.read_table(path).to_pylist()]
    assert len(source) == len(rows) == 20
    clips = [audio.read(row["source"], small.CONFIG.sampling_rate)[0] for row in rows]
    encoded = list(snax.encode_many(small.model(), clips))
    for index in np.random.default_rng(0).permutation(20):
        row, expected = source[index], rows[index]
        for level, codes in enumerate(encoded[index].codes):
            assert row["codes"][level].dtype == np.uint16
            np.testing.assert_array_equal(row["codes"][level], codes)
            assert expected.pop(f"codes_{level}") == row["codes"][level].tolist()
        assert row.pop("tokens").tolist() == expected.pop("tokens")
        del row["codes"]
        assert row == expected
    assert source[-1]["id"] == source[19]["id"]
    with pytest.raises(IndexError, match="row 20 is out of range for 20 rows"):
        source[20]


def test_threads_and_pickling(shards: Path) -> None:
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


def test_detects_flipped_bits(copied: Path) -> None:
    path = copied / "tokens-00001-of-00003.parquet"
    whole = path.read_bytes()
    for offset in range(0, len(whole), len(whole) // 200):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 16]) + whole[offset + 1 :])
        source = snax.open_tokens(copied)
        assert source[0]["id"], "the other shards must be readable"
        with pytest.raises(ValueError, match="tokens-00001-of-00003.parquet is corrupt: .* Run `snax extract` again"):
            source[7]


def test_detects_corruption_after_verification(copied: Path) -> None:
    """After the first read of a shard, page checksums still detect corruption."""
    path = copied / "tokens-00001-of-00003.parquet"
    whole = path.read_bytes()
    source = snax.open_tokens(copied)
    assert source[7]["id"]  # in the first row group
    expected = snax.open_tokens(copied)[13]
    metadata = pq.read_metadata(path).row_group(3)
    offsets = [metadata.column(i).dictionary_page_offset or metadata.column(i).data_page_offset for i in range(5)]
    for i, offset in enumerate(offsets):
        last = offset + metadata.column(i).total_compressed_size - 1
        path.write_bytes(whole[:last] + bytes([whole[last] ^ 16]) + whole[last + 1 :])
        with pytest.raises(ValueError, match="tokens-00001-of-00003.parquet cannot be read: "):
            source[13]
    path.write_bytes(whole)
    np.testing.assert_equal(source[13], expected)


def test_rejects_unfinished_and_incomplete_extractions(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no _SUCCESS file, so its extraction is not finished"):
        snax.open_tokens(tmp_path / "nothing")
    (copied / "tokens-00002-of-00003.parquet").unlink()
    source = snax.open_tokens(copied)
    with pytest.raises(ValueError, match="tokens-00002-of-00003.parquet is missing. Run `snax extract` again"):
        source[19]
    os.truncate(copied / "_SUCCESS", 20)
    with pytest.raises(ValueError, match="_SUCCESS is corrupt"):
        snax.open_tokens(copied)
