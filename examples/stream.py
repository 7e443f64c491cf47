"""Decode codes as a language model generates them: `python examples/stream.py`.

The codes come from a clip and arrive one coarse frame at a time, as from a language model.
"""

import time

import numpy as np

import snax
from snax.data.audio import read

from demo import CLIP, load


def main() -> None:
    model, _ = load()
    config = model.config
    codes = model.encode(read(CLIP, config.sampling_rate)[None])
    expected = model.decode(codes)
    frames = codes[0].shape[1]
    print(f"{frames} coarse frames of {config.pad_multiple / config.sampling_rate * 1000:.0f} ms")

    decoder = snax.StreamDecoder(model)
    print(f"latency: {decoder.latency / config.sampling_rate * 1000:.0f} ms")
    by_frame = [np.asarray(level).reshape(1, frames, -1) for level in codes]
    decoder.step(decoder.init_state(), [level[:, 0] for level in by_frame])  # compiles

    state, pieces, times = decoder.init_state(), [], []
    for i in range(frames):
        start = time.perf_counter()
        state, audio = decoder.step(state, [level[:, i] for level in by_frame])
        times.append(time.perf_counter() - start)
        pieces.append(audio)
        if i < 5:
            print(f"  frame {i}: {audio.shape[2]} samples")
    pieces.append(decoder.flush(state))

    print(f"median step: {np.median(times) * 1000:.0f} ms")
    difference = np.abs(np.concatenate(pieces, axis=2) - expected).max()
    print(f"largest difference from decoding all codes at once: {difference:.1e}")


if __name__ == "__main__":
    main()
