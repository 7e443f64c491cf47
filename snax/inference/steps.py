"""Encode and decode streams, one chunk after another. Each layer caches the end of its input for the next chunk."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from ..codec.config import SNACConfig
from ..codec.layers import Context, Layer, NoiseBlock, flatten, round_up
from ..codec.model import SNAC
from ..codec.noise import draw_noise

# More latent frames than the receptive field of any codec. Distances to the ends of a stream are clipped to it, because
# a sample count would overflow 32 bits within a day.
FAR = 4096


class Align(Layer):
    """The identity with a block size: in a stream, it delays its input to whole blocks of `steps`."""

    def __init__(self, steps: int):
        self.steps = steps

    @property
    def block_size(self) -> int:
        return self.steps

    def __call__(self, x: Float[Array, "batch time _"], context: Context = Context()) -> Float[Array, "batch time _"]:
        return x


def step_layers(
    layers: Iterable[Layer],
    x: Array,
    rate: int,
    past: Sequence[Array] | None,
    frames: int | Array,
    after: int | Array,
    draw: Callable[[Array], Sequence[Array]] | None = None,
) -> tuple[Array, tuple[Array, ...], int]:
    """Apply layers to the next chunk of a stream. Each layer caches the end of its input for the next call.

    Args:
        layers: the layers, in order.
        x: the next chunk, (batch, steps, channels).
        rate: steps of `x` per latent frame.
        past: the caches returned by the previous call. None: zeros.
        frames: latent frames before `x`, for all streams or (batch,).
        after: latent frames from the start of `x` to the end of the stream, for all streams or (batch,). 0 or less if
            `x` is padding after the end, `FAR` while the end is not known.
        draw: returns the noise of each decoder block for latent frames at these positions, (1 or batch, frames).

    Returns:
        The output of `steps * output_ratio(layers)` steps, the new caches, and the delay of the output in output steps.
    """
    frames, after = jnp.atleast_1d(frames)[:, None], jnp.atleast_1d(after)[:, None]
    before = jnp.minimum(frames, FAR)
    delay, caches = 0, list[Array]()
    for layer in flatten(layers):
        batch, steps, channels = x.shape
        context = round_up(layer.receptive_field, layer.block_size)  # on each side
        lag = round_up(delay + context, layer.block_size)  # of the output behind the input, in input steps
        size = lag - delay + context  # of the cache
        if size:
            cache = jnp.zeros((batch, size, channels), x.dtype) if past is None else past[len(caches)]
            x = jnp.concatenate([cache, x], axis=1)
            caches.append(x[:, steps:])
        x = x[:, : steps + 2 * context]
        position = jnp.arange(x.shape[1])[None] - lag - context  # relative to the new chunk
        padding_mask = (position >= -before * rate) & (position < after * rate)
        noise = None
        if draw is not None and isinstance(layer, NoiseBlock):
            # Draw for the latent frames in which x begins to end, then skip the steps before x.
            first = -(-lag // rate)
            positions = frames - first + jnp.arange(first - (lag - steps) // rate)[None]
            skipped = first * rate - lag
            noise = [block[:, skipped : skipped + steps] for block in draw(positions)]
        y = layer(x, Context(padding_mask, noise))
        x = y[:, int(context * layer.output_ratio) : int((context + steps) * layer.output_ratio)]
        rate, delay = int(rate * layer.output_ratio), int(lag * layer.output_ratio)
    return x, tuple(caches), delay


@functools.partial(jax.tree_util.register_dataclass, data_fields=["outputs", "caches"], meta_fields=["delay"])
@dataclasses.dataclass(frozen=True)
class Step:
    """The outputs of a step, (batch, time) each, and their delay behind the input in blocks (pad multiples)."""

    outputs: list[Any]
    caches: tuple[Any, ...]
    delay: Fraction


def encode_step(
    model: SNAC,
    inputs: list[Array],
    past: Sequence[Array] | None,
    key: None,
    frames: int | Array,
    after: int | Array,
) -> Step:
    """Encode the next samples, (batch, samples) in a list of one, to codes. See `step_layers`."""
    config = model.config
    layers = [*model.encoder.layers, Align(math.lcm(*config.vq_strides))]
    audio = inputs[0][..., None].astype(model.dtype)
    latents, caches, delay = step_layers(layers, audio, config.hop_length, past, frames, after)
    codes = model.quantizer(latents).codes
    return Step(list(codes), caches, Fraction(delay * config.hop_length, config.pad_multiple))


def decode_step(
    model: SNAC,
    inputs: list[Array],
    past: Sequence[Array] | None,
    key: Array | None,
    frames: int | Array,
    after: int | Array,
) -> Step:
    """Decode the next codes, (batch, frames / stride) for each level, to samples. See `step_layers`."""
    config = model.config
    latents = model.quantizer.dequantize(inputs)
    draw = None if key is None else functools.partial(draw_noise, config, key)
    audio, caches, delay = step_layers(model.decoder.layers, latents, 1, past, frames, after, draw)
    return Step([audio[..., 0]], caches, Fraction(delay, config.pad_multiple))


def encoder_widths(config: SNACConfig) -> list[int]:
    """Return the samples of a block."""
    return [config.pad_multiple]


def decoder_widths(config: SNACConfig) -> list[int]:
    """Return the codes of each level in a block."""
    return [config.pad_multiple // config.hop_length // stride for stride in config.vq_strides]


def step_shapes(
    apply: Callable[..., Step], model: SNAC, widths: Sequence[int], dtype: type[np.generic], batch: int = 1
) -> Step:
    """Return the shapes of a step of one block, and its delay. `widths` are the values per block of each input."""
    block = [jax.ShapeDtypeStruct((batch, width), dtype) for width in widths]
    shapes: Step = jax.eval_shape(apply, model, block, None, None, 0, FAR)
    return shapes
