"""Matrix-product efficiency and time by kind of layer: `python -m benchmarks.profile`.

Encodes and decodes 10 s with snac_24khz. Prints the fraction of the machine's own matrix-product rate that snax
reaches, and the time by kind of layer. A fused instruction counts as the kind of its result: a Snake that is fused
with the convolution after it counts as that convolution.
"""

import collections
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import snax
from benchmarks.hlo import kinds_by_name
from snax.codec.config import PUBLISHED_CONFIGS

SECONDS = 10


def main() -> None:
    rate = matmul_rate()
    print(f"products of 2048 x 2048 matrices: {rate / 1e9:.0f} GFLOP/s")
    config = PUBLISHED_CONFIGS["snac_24khz"]
    model = snax.SNAC(config, rngs=nnx.Rngs(0))
    samples = SECONDS * config.sampling_rate // config.pad_multiple * config.pad_multiple
    audio = jnp.asarray(0.1 * np.random.default_rng(0).standard_normal((1, 1, samples)), jnp.float32)
    codes, key = model.encode(audio), jax.random.key(0)
    encode, decode = jax.jit(snax.SNAC._encode).lower(model, audio), jax.jit(snax.SNAC._decode).lower(model, codes, key)
    report(
        "encode",
        lambda: model.encode(audio),
        kinds_by_name(encode.compile().as_text()),
        encoding_flops(config, samples),
        rate,
    )
    report(
        "decode",
        lambda: model.decode(codes, key=key),
        kinds_by_name(decode.compile().as_text()),
        decoding_flops(config, samples),
        rate,
    )


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


def encoding_flops(config: snax.SNACConfig, samples: int) -> float:
    """Return the FLOPs of the encoder's matrix products: strided and pointwise convolutions (depthwise models)."""
    flops, channels, time = 0.0, config.encoder_dim, samples
    for rate in config.encoder_rates:
        flops += 3 * 2 * time * channels**2  # residual units
        time //= rate
        flops += 2 * time * (2 * rate * channels) * (2 * channels)
        channels *= 2
    return flops


def decoding_flops(config: snax.SNACConfig, samples: int) -> float:
    """Return the FLOPs of the decoder's matrix products: pointwise and transposed convolutions (depthwise models)."""
    channels, time = config.decoder_dim, samples // config.hop_length
    flops = 2.0 * time * config.latent_dim * channels
    for rate in config.decoder_rates:
        flops += 2 * time * channels * (2 * rate * channels // 2)
        channels //= 2
        time *= rate
        flops += (3 + config.noise) * 2 * time * channels**2  # residual units and noise
    return flops


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
