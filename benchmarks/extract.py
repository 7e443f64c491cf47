"""Speed of `snax extract` relative to `encode_many`: `python -m benchmarks.extract`.

`snax extract` encodes a corpus of FLAC and MP3 files to shards. `encode_many` encodes the same clips, already decoded.
They take turns in one process on all cores. snac_24khz architecture, float32. Takes about five minutes.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from flax import nnx

import snax
from benchmarks.many import clips
from snax.codec.config import PUBLISHED_CONFIGS
from snax.data import audio
from snax.extract.config import ExtractConfig
from snax.extract.run import extract

SECONDS, RATE, ROUNDS = 1200, 44_100, 3


def main() -> None:
    model = snax.SNAC(PUBLISHED_CONFIGS["snac_24khz"], rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for i, clip in enumerate(clips(RATE, SECONDS)):
            soundfile.write(corpus / f"{i:04}.{('flac', 'mp3')[i % 2]}", clip, RATE)
        start = time.perf_counter()
        decoded = [audio.read(path, model.config.sampling_rate)[0] for path in sorted(corpus.iterdir())]
        print(f"{len(decoded)} clips, {SECONDS} s. One thread decodes files at {speed(start):.0f} x real time.")
        list(snax.encode_many(model, decoded[:1]))  # compiles
        encode_speeds, extract_speeds = [], []
        for i in range(ROUNDS):
            start = time.perf_counter()
            encoded = list(snax.encode_many(model, decoded))
            encode_speeds.append(speed(start))
            start = time.perf_counter()
            out = Path(folder, f"out {i}")
            summary = extract(model, ExtractConfig([str(corpus)], out=str(out)))
            extract_speeds.append(speed(start))
            print(f"encode_many {encode_speeds[-1]:.1f} x real time, extract {extract_speeds[-1]:.1f} x")
            print(f"  seconds of extract: {json.dumps(summary['seconds'])}")
        for row, clip in zip(snax.open_tokens(out), encoded, strict=True):
            for stored, expected in zip(row["codes"], clip.codes, strict=True):
                np.testing.assert_array_equal(stored, expected)
    ratio = statistics.median(extract_speeds) / statistics.median(encode_speeds)
    print(f"extract: {ratio:.1%} of the speed of encode_many (medians of {ROUNDS})")
    print(f"packing efficiency: {summary['packing_efficiency']:.1%}")


def speed(start: float) -> float:
    return SECONDS / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
