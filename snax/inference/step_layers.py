"""Apply a list of layers to a stream, one piece of input after the other."""

from collections.abc import Callable, Iterable, Sequence

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..codec.layers import Context, Layer, NoiseBlock, flatten, round_up

# More latent frames than any codec's receptive field. Distances to the ends of a stream are clipped to it, because
# counts of samples would overflow 32 bits within a day.
FAR = 4096


class Align(Layer):
    """The identity, in blocks: delays its input to whole blocks of `steps`."""

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
    """Apply the layers to the next input of a stream. Each layer keeps the end of its own input for the next call.

    Args:
        layers: the layers, in order.
        x: the next input, (batch, steps, channels).
        rate: steps of `x` per latent frame.
        past: the caches returned by the last call. None: zeros.
        frames: latent frames before `x`.
        ended: whether `x` is padding after the end of the stream.
        draw: returns the noise of all decoder blocks for latent frames at these positions, (1, frames).

    Returns:
        The output, `steps * output_ratio(layers)` long; the caches; and the delay of the output in its own steps.
    """
    before, after = jnp.minimum(frames, FAR), jnp.where(ended, 0, FAR)
    delay, kept = 0, list[Array]()
    for layer in flatten(layers):
        batch, steps, channels = x.shape
        reach = round_up(layer.receptive_field, layer.block_size)
        due = round_up(delay + reach, layer.block_size)
        size = due - delay + reach  # of what is kept
        if size:
            cache = jnp.zeros((batch, size, channels), x.dtype) if past is None else past[len(kept)]
            x = jnp.concatenate([cache, x], axis=1)
            kept.append(x[:, steps:])
        x = x[:, : steps + 2 * reach]
        position = jnp.arange(x.shape[1]) - due - reach  # from the first step of the new input
        padding_mask = (position >= -before * rate) & (position < after * rate)
        noise = None
        if draw is not None and isinstance(layer, NoiseBlock):
            # From the latent frame in which x begins to the one in which it ends.
            first = -(-due // rate)
            positions = frames - first + jnp.arange(first - (due - steps) // rate)
            skipped = first * rate - due
            noise = [draws[:, skipped : skipped + steps] for draws in draw(positions[None])]
        y = layer(x, Context(padding_mask[None], noise))
        x = y[:, int(reach * layer.output_ratio) : int((reach + steps) * layer.output_ratio)]
        rate, delay = int(rate * layer.output_ratio), int(due * layer.output_ratio)
    return x, tuple(kept), delay
