"""Packed rows for clips of mixed lengths and for long clips: `python -m benchmarks.many`.

Measures:
- packing efficiency, in rows and in batches padded to the longest clip;
- the throughput of `encode_many` on a corpus, and of the reference clip by clip;
- speed and memory for ten seconds, a minute and an hour of real audio, each in a process of its own.

snac_24khz architecture, float32. With `--hour 44`, only one clip of an hour with the 44 kHz architecture, which takes
about 20 minutes.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import snac
import torch
from flax import nnx

import snax
from snax.codec.config import PUBLISHED_CONFIGS
from snax.inference.packing import computed_blocks
from tests.helpers.recordings import DATA, clip

BATCH = 32  # clips in a padded batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hour", choices=["24", "44"], default="24")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, seconds = args.measure
        print(json.dumps(measure(name, int(seconds))))
    elif args.hour == "44":
        report("snac_44khz", 3600)
    else:
        efficiency()
        throughput()
        single_clip()
        for seconds in (10, 60, 3600):
            report("snac_24khz", seconds)


def read_speech_lengths(count: int) -> np.ndarray:
    """Return clip lengths in seconds like those of read speech: uniform between 2 and 15."""
    return np.random.default_rng(0).uniform(2, 15, count)


def efficiency() -> None:
    """Print the share of computed frames that belong to clips, for packed rows and for padded batches."""
    seconds = read_speech_lengths(10_000)
    for name, config in PUBLISHED_CONFIGS.items():
        blocks = np.ceil(seconds * config.sampling_rate / config.pad_multiple).astype(int)
        packed = computed_blocks(snax.SNAC(config, rngs=None), blocks.tolist())
        padded = sum(len(batch) * batch.max() for batch in np.array_split(blocks, len(blocks) // BATCH))
        print(f"{name}, packing efficiency: {blocks.sum() / packed:.1%} in packed rows, ", end="")
        print(f"{blocks.sum() / padded:.1%} in batches of {BATCH} padded to the longest clip")


def real_audio(rate: int) -> np.ndarray:
    """Return the bundled clips end to end, about 20 s of speech and music."""
    names = sorted(path.name for path in DATA.iterdir() if path.suffix in (".wav", ".flac"))
    return np.concatenate([clip(name, rate, 10)[0, 0] for name in names])


def clips(rate: int, seconds: float) -> Iterator[np.ndarray]:
    """Yield clips of real audio with the lengths of read speech, `seconds` in total."""
    audio, total = np.tile(real_audio(rate), 2), 0.0
    for i, length in enumerate(read_speech_lengths(10_000)):
        length = min(length, seconds - total)
        if length <= 0:
            return
        start = 997 * i % (len(audio) // 2)
        yield audio[start : start + round(length * rate)]
        total += length


def throughput() -> None:
    config = PUBLISHED_CONFIGS["snac_24khz"]
    model = snax.SNAC(config, rngs=nnx.Rngs(0))
    reference = snac.SNAC(**config.to_dict()).eval()
    corpus = list(clips(config.sampling_rate, 300))
    list(snax.encode_many(model, corpus[:1]))  # compiles
    start = time.perf_counter()
    for _ in snax.encode_many(model, corpus):
        pass
    snax_speed = 300 / (time.perf_counter() - start)
    start = time.perf_counter()
    with torch.inference_mode():
        for audio in corpus:
            reference.encode(torch.from_numpy(audio)[None, None])
    torch_speed = 300 / (time.perf_counter() - start)
    print(f"{len(corpus)} clips, 300 s: encode_many {snax_speed:.1f} x real time, ", end="")
    print(f"torch clip by clip {torch_speed:.1f} x")


def single_clip() -> None:
    """Print the speed of `encode` and `decode` for one clip of ten seconds, as a baseline for `report`."""
    config = PUBLISHED_CONFIGS["snac_24khz"]
    model = snax.SNAC(config, rngs=nnx.Rngs(0))
    audio = next(clips(config.sampling_rate, 1000))
    audio = np.resize(audio, 10 * config.sampling_rate)[None, None]
    codes = model.encode(audio)
    for name, run in (("encode", lambda: model.encode(audio)), ("decode", lambda: model.decode(codes))):
        times = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        print(f"{name}, one clip of 10 s: {10 / np.median(times[1:]):.1f} x real time")


def report(name: str, seconds: int) -> None:
    """Print the result of `measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.many", "--measure", name, str(seconds)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"{name}, {seconds:4} s: encode_many {result['encode']:.1f} x real time, "
        f"decode_many {result['decode']:.1f} x, peak memory {result['megabytes']:.0f} MB"
    )


def measure(name: str, seconds: int) -> dict[str, float]:
    """Return the speeds as multiples of real time, without compilation, and the peak memory in MB."""
    config = PUBLISHED_CONFIGS[name]
    model = snax.SNAC(config, rngs=nnx.Rngs(0))
    rate = config.sampling_rate
    source = [np.resize(real_audio(rate), seconds * rate)] if name == "snac_44khz" else clips(rate, seconds)
    list(snax.decode_many(model, snax.encode_many(model, [np.zeros(rate, np.float32)])))  # compiles
    start = time.perf_counter()
    encoded = list(snax.encode_many(model, source))
    between = time.perf_counter()
    samples = sum(len(audio) for audio in snax.decode_many(model, encoded))
    end = time.perf_counter()
    assert samples == sum(clip.samples for clip in encoded)
    return {"encode": seconds / (between - start), "decode": seconds / (end - between), "megabytes": peak_memory()}


def peak_memory() -> float:
    """Return this process's peak memory in MB. (On Linux, `getrusage` starts from the peak of the parent process.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


if __name__ == "__main__":
    main()
