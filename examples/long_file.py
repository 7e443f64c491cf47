"""A file of any length in the memory that one row takes: `python examples/long_file.py [AUDIO]`.

Without a file, ten minutes made of the bundled clip. What comes out is what the file would give in one piece, which
takes a memory of 3 MB per second of audio.
"""

import sys
import time
from pathlib import Path

import numpy as np

import snax
from snax.data.audio import read

from demo import CLIP, load


def main() -> None:
    model, _ = load()
    rate = model.config.sampling_rate
    audio = read(Path(sys.argv[1]) if len(sys.argv) > 1 else CLIP, rate)[0]
    if len(sys.argv) == 1:
        audio = np.resize(audio, 600 * rate)  # over and over

    start = time.perf_counter()
    (encoded,) = snax.encode_many(model, [audio])
    (decoded,) = snax.decode_many(model, [encoded])
    seconds = len(audio) / rate
    print(f"{seconds:.0f} s of audio, {sum(map(len, encoded.codes))} tokens, {len(decoded)} samples decoded")
    print(f"there and back at {seconds / (time.perf_counter() - start):.0f} x real time, compilation included")


if __name__ == "__main__":
    main()
