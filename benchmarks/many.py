"""Many clips, and long ones: `python -m benchmarks.many`.

How much of what is computed is asked for; the speed of a corpus beside the reference clip by clip; and the memory and
speed of an hour of real audio beside those of a minute and of ten seconds, each in a process of its own. snac_24khz
architecture, float32; with `--hour 44`, one clip of an hour with the 44 kHz architecture instead, some 20 minutes.
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

ROWS_OF_A_BATCH = 32  # clips that a padded batch has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hour", choices=["24", "44"], default="24")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, seconds = arguments.measure
        print(json.dumps(measure(name, int(seconds))))
    elif arguments.hour == "44":
        report("snac_44khz", 3600)
    else:
        efficiency()
        throughput()
        once()
        for seconds in (10, 60, 3600):
            report("snac_24khz", seconds)


def read_speech_lengths(count: int) -> np.ndarray:
    """Seconds of clips as a read-speech corpus has them: 2 to 15, any as often."""
    return np.random.default_rng(0).uniform(2, 15, count)


def efficiency() -> None:
    """Frames of clips over frames computed, in packed rows and in batches padded to the longest."""
    seconds = read_speech_lengths(10_000)
    for name, config in PUBLISHED_CONFIGS.items():
        units = np.ceil(seconds * config.sampling_rate / config.pad_multiple).astype(int)
        computed = computed_blocks(snax.SNAC(config, rngs=None), units.tolist())
        padded = sum(len(batch) * batch.max() for batch in np.array_split(units, len(units) // ROWS_OF_A_BATCH))
        print(f"{name}: {units.sum() / computed:.1%} of the frames computed in packed rows are clips', ", end="")
        print(f"{units.sum() / padded:.1%} in batches of {ROWS_OF_A_BATCH} padded to the longest")


def real_audio(rate: int) -> np.ndarray:
    """The bundled clips end to end, some 20 s of speech and music."""
    names = sorted(path.name for path in DATA.iterdir() if path.suffix in (".wav", ".flac"))
    return np.concatenate([clip(name, rate, 10)[0, 0] for name in names])


def clips(rate: int, seconds: float) -> Iterator[np.ndarray]:
    """Real audio of `seconds` in all, in clips of a read-speech corpus' lengths."""
    audio, at = np.tile(real_audio(rate), 2), 0.0
    for i, length in enumerate(read_speech_lengths(10_000)):
        length = min(length, seconds - at)
        if length <= 0:
            return
        begin = 997 * i % (len(audio) // 2)
        yield audio[begin : begin + round(length * rate)]
        at += length


def throughput() -> None:
    config = PUBLISHED_CONFIGS["snac_24khz"]
    model = snax.SNAC(config, rngs=nnx.Rngs(0))
    reference = snac.SNAC(**config.to_dict()).eval()
    corpus = list(clips(config.sampling_rate, 300))
    list(snax.encode_many(model, corpus[:1]))  # compiles
    start = time.perf_counter()
    for _ in snax.encode_many(model, corpus):
        pass
    ours = 300 / (time.perf_counter() - start)
    start = time.perf_counter()
    with torch.inference_mode():
        for audio in corpus:
            reference.encode(torch.from_numpy(audio)[None, None])
    theirs = 300 / (time.perf_counter() - start)
    print(f"{len(corpus)} clips, 300 s: encode_many {ours:.1f} x real time, torch clip by clip {theirs:.1f} x")


def once() -> None:
    """`encode` and `decode` of ten seconds in one piece, what `report` is to be compared with."""
    config = PUBLISHED_CONFIGS["snac_24khz"]
    model = snax.SNAC(config, rngs=nnx.Rngs(0))
    audio = next(clips(config.sampling_rate, 1000))
    audio = np.resize(audio, 10 * config.sampling_rate)[None, None]
    codes = model.encode(audio)
    for what, run in (("encode", lambda: model.encode(audio)), ("decode", lambda: model.decode(codes))):
        times = []
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready(run())
            times.append(time.perf_counter() - start)
        print(f"{what} of one clip of 10 s: {10 / np.median(times[1:]):.1f} x real time")


def report(name: str, seconds: int) -> None:
    command = [sys.executable, "-m", "benchmarks.many", "--measure", name, str(seconds)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        f"{name}, {seconds:4} s: encode_many {found['encode']:.1f} x real time, decode_many {found['decode']:.1f} x; "
        f"at most {found['megabytes']:.0f} MB in memory"
    )


def measure(name: str, seconds: int) -> dict[str, float]:
    """Multiples of real time and the peak of memory, compilation not timed."""
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
    return {"encode": seconds / (between - start), "decode": seconds / (end - between), "megabytes": peak()}


def peak() -> float:
    """MB that this process had in memory at most, as Linux says; `getrusage` would begin with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1000


if __name__ == "__main__":
    main()
