"""A corpus of FLAC and MP3 to shards, beside bare `encode_many`: `python -m benchmarks.extract`.

The same clips, already decoded, go through `encode_many` in turns with the whole job from files to shards, in one
process on all cores. snac_24khz architecture, float32. Some five minutes.
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
from snax.extract.run import ExtractConfig, extract

SECONDS, RATE, TURNS = 1200, 44_100, 3


def main() -> None:
    model = snax.SNAC(PUBLISHED_CONFIGS["snac_24khz"], rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        for i, clip in enumerate(clips(RATE, SECONDS)):
            soundfile.write(corpus / f"{i:04}.{('flac', 'mp3')[i % 2]}", clip, RATE)
        begin = time.perf_counter()
        decoded = [audio.read(path, model.config.sampling_rate)[0] for path in sorted(corpus.iterdir())]
        print(f"{len(decoded)} clips, {SECONDS} s; decoded by one thread at {speed(begin):.0f} x real time")
        list(snax.encode_many(model, decoded[:1]))  # compiles
        bare, whole = [], []
        for turn in range(TURNS):
            begin = time.perf_counter()
            encoded = list(snax.encode_many(model, decoded))
            bare.append(speed(begin))
            begin = time.perf_counter()
            out = Path(folder, f"out {turn}")
            end = extract(model, ExtractConfig([str(corpus)], str(out), "snac_24khz"))
            whole.append(speed(begin))
            print(f"encode_many {bare[-1]:.1f} x real time, extract {whole[-1]:.1f} x; {json.dumps(end['seconds'])}")
        for row, clip in zip(snax.open_tokens(out), encoded, strict=True):
            for ours, theirs in zip(row["codes"], clip.codes, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    ratio = statistics.median(whole) / statistics.median(bare)
    print(f"extract: {ratio:.1%} of encode_many's speed (medians of {TURNS}); packing {end['packing_efficiency']:.1%}")


def speed(begin: float) -> float:
    return SECONDS / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
