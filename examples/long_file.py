"""Encode and decode a long file in constant memory: `python examples/long_file.py [AUDIO]`.

Without AUDIO, repeats the bundled clip for ten minutes. The result is that of `encode` and `decode`, which take 3 MB of
memory per second of audio.
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
        audio = np.resize(audio, 600 * rate)  # repeats the clip

    start = time.perf_counter()
    (encoded,) = snax.encode_many(model, [audio])
    (decoded,) = snax.decode_many(model, [encoded])
    seconds = len(audio) / rate
    print(f"{seconds:.0f} s of audio, {sum(map(len, encoded.codes))} tokens, {len(decoded)} samples decoded")
    print(f"encoded and decoded at {seconds / (time.perf_counter() - start):.0f} x real time, with compilation")


if __name__ == "__main__":
    main()
