"""Memory per second of audio, for snax and the reference: `python -m benchmarks.memory`.

The difference between the peak memory of a process for 60 s and of one for 10 s, divided by 50 s. Weights, libraries
and compilation cancel out. snac_24khz architecture.
"""

import resource
import subprocess
import sys

import jax
import numpy as np
import snac
import torch
from flax import nnx

import snax
from snax.codec.config import PUBLISHED_CONFIGS

SHORT, LONG = 10, 60


def main() -> None:
    for system in ("snax", "torch"):
        for operation in ("encode", "decode"):
            short, long = (peak_in_process(system, operation, seconds) for seconds in (SHORT, LONG))
            per_second = (long - short) / (LONG - SHORT)
            print(f"{system:5} {operation}  {per_second:5.1f} MB per second of audio; {LONG} s: peak {long:5.0f} MB")


def peak_in_process(system: str, operation: str, seconds: int) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", system, operation, str(seconds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def peak(system: str, operation: str, seconds: int) -> float:
    """Return the peak memory of this process in MB after one call."""
    config = PUBLISHED_CONFIGS["snac_24khz"]
    samples = seconds * config.sampling_rate // config.pad_multiple * config.pad_multiple
    audio = 0.1 * np.random.default_rng(0).standard_normal((1, 1, samples), np.float32)
    codes = [np.zeros((1, samples // config.hop_length // stride), np.int32) for stride in config.vq_strides]
    encode = operation == "encode"
    if system == "snax":
        model = snax.SNAC(config, rngs=nnx.Rngs(0))
        jax.block_until_ready(model.encode(audio) if encode else model.decode(codes, key=jax.random.key(0)))
    else:
        reference = snac.SNAC(**config.to_dict()).eval()
        with torch.inference_mode():
            if encode:
                reference.encode(torch.from_numpy(audio))
            else:
                reference.decode([torch.from_numpy(level) for level in codes])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # kB on Linux


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(peak(sys.argv[1], sys.argv[2], int(sys.argv[3])))
