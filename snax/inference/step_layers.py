"""Apply layers to a stream, one chunk after another."""

from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..codec.layers import Context, Layer, NoiseBlock, flatten, round_up

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
    ended: bool | Array,
    draw: Callable[[Array], Sequence[Array]] | None = None,
) -> tuple[Array, tuple[Array, ...], int]:
    """Apply layers to the next chunk of a stream. Each layer caches the end of its input for the next call.

    Args:
        layers: the layers, in order.
        x: the next chunk, (batch, steps, channels).
        rate: steps of `x` per latent frame.
        past: the caches returned by the previous call. None: zeros.
        frames: latent frames before `x`.
        ended: whether `x` is padding after the end of the stream.
        draw: returns the noise of each decoder block for latent frames at these positions, (1, frames).

    Returns:
        The output of `steps * output_ratio(layers)` steps, the new caches, and the delay of the output in output steps.
    """
    before, after = jnp.minimum(frames, FAR), jnp.where(ended, 0, FAR)
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
        position = jnp.arange(x.shape[1]) - lag - context  # relative to the new chunk
        padding_mask = (position >= -before * rate) & (position < after * rate)
        noise = None
        if draw is not None and isinstance(layer, NoiseBlock):
            # Draw for the latent frames in which x begins to end, then skip the steps before x.
            first = -(-lag // rate)
            positions = frames - first + jnp.arange(first - (lag - steps) // rate)
            skipped = first * rate - lag
            noise = [block[:, skipped : skipped + steps] for block in draw(positions[None])]
        y = layer(x, Context(padding_mask[None], noise))
        x = y[:, int(context * layer.output_ratio) : int((context + steps) * layer.output_ratio)]
        rate, delay = int(rate * layer.output_ratio), int(lag * layer.output_ratio)
    return x, tuple(caches), delay
