"""Matrix-product efficiency and time by kind of layer: `python -m benchmarks.profile`.

Encodes and decodes 10 s with snac_24khz and snac_32khz. Prints the fraction of the machine's own matrix-product rate
that snax reaches, and the time by kind of layer, summed over threads. Eigen computes large products asynchronously, and
these are not in the profile. A fused instruction counts as the kind of its result: a Snake that is fused with the
convolution after it counts as that convolution.
"""

import collections
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import snac
import torch
from flax import nnx

import snax
from benchmarks.hlo import kinds_by_name
from benchmarks.speed import flop
from snax.codec.compiled import compiler_options
from snax.codec.config import PUBLISHED_CONFIGS

SECONDS = 10


def main() -> None:
    rate = matmul_rate()
    print(f"products of 2048 x 2048 matrices: {rate / 1e9:.0f} GFLOP/s")
    for name in ("snac_24khz", "snac_32khz"):
        config = PUBLISHED_CONFIGS[name]
        model = snax.SNAC(config, rngs=nnx.Rngs(0))
        samples = SECONDS * config.sampling_rate // config.pad_multiple * config.pad_multiple
        audio = 0.1 * np.random.default_rng(0).standard_normal((1, 1, samples), np.float32)
        with torch.inference_mode():
            flops = flop(snac.SNAC(**config.to_dict()).eval(), torch.from_numpy(audio))
        codes, key = model.encode(audio), jax.random.key(0)
        options = compiler_options("cpu")
        encode = jax.jit(snax.SNAC._encode, compiler_options=options).lower(model, audio)
        decode = jax.jit(snax.SNAC._decode, compiler_options=options).lower(model, codes, key)
        for operation, run, lowered in (
            ("encode", functools.partial(model.encode, audio), encode),
            ("decode", functools.partial(model.decode, codes, key=key), decode),
        ):
            kinds = kinds_by_name(lowered.compile().as_text())
            report(f"{name}, {operation}", run, kinds, flops[operation], rate)


def report(operation: str, run: Callable[[], Any], kinds: dict[str, str], flops: float, rate: float) -> None:
    seconds = median_seconds(run)
    print(
        f"\n{operation}: {1000 * seconds:.0f} ms; matrix products of the reference: {flops / 1e9:.0f} GFLOP, "
        f"{100 * flops / seconds / rate:.0f} % of the rate above"
    )
    times: collections.Counter[str] = collections.Counter()
    for name, nanoseconds in profile(run):
        if name in kinds:
            times[kinds[name]] += nanoseconds
    for kind, nanoseconds in times.most_common():
        print(f"  {kind:16} {nanoseconds / 1e6:6.0f} ms  {100 * nanoseconds / times.total():3.0f} %")


def matmul_rate() -> float:
    """Return FLOP/s of float32 products of 2048 x 2048 matrices."""
    x = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    return 2 * 2048**3 / median_seconds(lambda: product(x, x))


def median_seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def profile(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Return the name and the nanoseconds of every event on XLA's threads."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        lines = [line for plane in planes for line in plane.lines if line.name.startswith("tf_XLA")]
        return [(event.name, event.duration_ns) for line in lines for event in line.events]


if __name__ == "__main__":
    main()
