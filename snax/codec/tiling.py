"""Tile the full-rate layers in time so that their activations stay in cache.

These layers have most of the codec's activations, and their receptive field is about one latent frame. In tiles with
this much context, the activations stay in a CPU's cache or a TPU's vector memory. Without tiles they pass through main
memory a dozen times. Tiles make encoding of 10 s 1.3 times as fast on two cores; a TPU v5e moves a tenth of the bytes.
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from .layers import Context, Layer, StridedConv, flatten, output_ratio, receptive_field, run

# Samples of audio per tile, 8 MiB with 64 channels. On an Intel Xeon, tiles of half the size are slower, because more
# context is computed twice. On an AMD EPYC the two are equal within the noise. benchmarks/README.md has the figures.
TILE_SAMPLES = 32768
# A GPU is fastest without tiles. There, tiles limit the memory; the size is in samples of the whole batch.
GPU_TILE_SAMPLES = 1 << 23


def map_tiles(
    layers: Iterable[Layer], x: Float[Array, "batch time _"], context: Context = Context()
) -> Float[Array, "batch _ _"]:
    """Compute `run(layers, x, context)` in tiles of time. Each tile has the layers' receptive field on both sides."""
    layers = list(flatten(layers))
    ratio = output_ratio(layers)
    lengths = x.shape[1], int(x.shape[1] * ratio)
    frames, samples = min(lengths), max(lengths)  # latent frames or a multiple, and audio samples
    # The target platform is not known while tracing. If it is not the default backend, only the speed suffers.
    on_gpu = jax.default_backend() == "gpu"
    count = round(max(len(x) * samples / GPU_TILE_SAMPLES, 1)) if on_gpu else round(samples / TILE_SAMPLES)
    if count < 2 or any(isinstance(layer, StridedConv) and layer.stride == 1 for layer in layers):
        return run(layers, x, context)
    padding_mask, noise = context
    padding_mask = jnp.ones((1, frames), bool) if padding_mask is None else padding_mask
    padding_mask = jnp.repeat(padding_mask, frames // padding_mask.shape[1], axis=1)
    tile, margin = math.ceil(frames / count), math.ceil(receptive_field(layers) * frames / x.shape[1])

    def pad(x: Array) -> Array:
        steps = x.shape[1] // frames  # per frame
        widths = [(0, 0), (margin * steps, (count * tile - frames + margin) * steps)]
        return jnp.pad(x, widths + [(0, 0)] * (x.ndim - 2))

    inputs = jax.tree.map(pad, (x, Context(padding_mask, noise)))

    def run_tile(i: Array) -> Array:
        def window(x: Array) -> Array:
            steps = x.shape[1] // (count * tile + 2 * margin)
            return lax.dynamic_slice_in_dim(x, i * tile * steps, (tile + 2 * margin) * steps, axis=1)

        y = run(layers, *jax.tree.map(window, inputs))
        steps = y.shape[1] // (tile + 2 * margin)
        return y[:, margin * steps : (margin + tile) * steps]

    tiles = lax.map(run_tile, jnp.arange(count))
    merged = jnp.moveaxis(tiles, 0, 1).reshape(tiles.shape[1], -1, tiles.shape[-1])
    return merged[:, : merged.shape[1] // (count * tile) * frames]
