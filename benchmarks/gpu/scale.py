"""Time packed rows and the extraction of a corpus."""

import functools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile

import snax
from benchmarks.many import clips
from snax.extract.config import ExtractConfig
from snax.extract.run import extract

from .common import draw_weights, in_process, peak_gib, save, snax_model

NAME = "snac_24khz"
# Rows per batch, and the length of a row in seconds. None: the default, 25.6 s at 24 kHz.
ROWS: list[tuple[int, float | None]] = [(1, None), (4, None), (8, None), (16, None), (32, None), (16, 12.8), (4, 51.2)]
PACKED_SECONDS = 4000
CORPUS_RATE, CORPUS_SECONDS, COPIES = 16_000, 4000, 10


def scale(folder: Path) -> None:
    draw_weights(folder, NAME)
    result: dict[str, Any] = {}
    for part in (packed_rows, extraction):
        result[part.__name__] = part(folder)
        save("scale", result)


def packed_rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for count, seconds in ROWS:
        rows.append(in_process(time_rows, folder, count, seconds))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def time_rows(folder: Path, count: int, seconds: float | None) -> dict[str, Any]:
    """Return the speed of packed rows as a multiple of real time, and the peak memory."""
    model = snax_model(folder, NAME)
    corpus = list(clips(model.config.sampling_rate, PACKED_SECONDS))
    speeds: dict[str, float] = {}
    encode = functools.partial(snax.encode_many, rows=count, row_seconds=seconds)
    decode = functools.partial(snax.decode_many, rows=count, row_seconds=seconds, key=jax.random.key(0))
    encoded = list(encode(model, corpus[:1]))  # compiles
    list(decode(model, encoded))
    start = time.perf_counter()
    encoded = list(encode(model, corpus))
    speeds["encode_many"] = PACKED_SECONDS / (time.perf_counter() - start)
    start = time.perf_counter()
    list(decode(model, encoded))
    speeds["decode_many"] = PACKED_SECONDS / (time.perf_counter() - start)
    peak = peak_gib()
    return {"rows": count, "row_seconds": seconds, "peak GiB": peak} | speeds


def extraction(folder: Path) -> dict[str, Any]:
    corpus = folder / "corpus"
    corpus.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(functools.partial(write_copies, corpus), enumerate(clips(CORPUS_RATE, CORPUS_SECONDS))))
    result = {
        "cores": os.cpu_count(),
        "clips": sum(1 for _ in corpus.iterdir()),
        "hours": CORPUS_SECONDS * COPIES / 3600,
        "summary": in_process(extract_corpus, folder, corpus),
    }
    result["x real time"] = CORPUS_SECONDS * COPIES / result["summary"]["wall"]
    print(json.dumps(result), flush=True)
    return result


def write_copies(corpus: Path, numbered: tuple[int, np.ndarray]) -> None:
    """Write a clip as FLAC, and link to it under other names."""
    i, clip = numbered
    first = corpus / f"{i:05}-0.flac"
    soundfile.write(first, clip, CORPUS_RATE)
    for copy in range(1, COPIES):
        os.link(first, corpus / f"{i:05}-{copy}.flac")


def extract_corpus(folder: Path, corpus: Path) -> dict[str, Any]:
    model = snax_model(folder, NAME)
    warm_up = corpus / "00000-0.flac"
    extract(model, ExtractConfig([str(warm_up)], out=str(folder / "warm_up")))  # compiles
    start = time.perf_counter()
    summary = extract(model, ExtractConfig([str(corpus)], out=str(folder / "out")))
    return summary | {"wall": time.perf_counter() - start}
