"""The noise of the decoder blocks, which depends on a key and on the position in the clip only."""

import itertools
import operator

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int32, Key, PRNGKeyArray

from .config import SNACConfig


def draw_noise(
    config: SNACConfig, key: PRNGKeyArray | Key[Array, " batch"], positions: Int32[Array, "_ frames"]
) -> tuple[Float[Array, "_ _"], ...]:
    """Draw standard normal noise, a function of the key and the position of each latent frame in its clip.

    Args:
        config: the architecture.
        key: one key for all rows or one per row, (batch,).
        positions: the position of each latent frame in its clip, (1 or batch, frames).

    Returns:
        For each decoder block, the noise for each time step of its output, (1 or batch, steps).
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    fold_in_positions = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    per_row = 0 if key.ndim else None
    if per_row == 0 and len(positions) == 1:
        positions = jnp.broadcast_to(positions, (len(key), positions.shape[1]))
    keys = jax.vmap(fold_in_positions, in_axes=(per_row, 0))(key, positions)

    def draw(block: int, steps: int) -> Array:
        normal = jax.vmap(jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, block), (steps,))))
        return normal(keys).reshape(len(positions), -1)

    steps_per_frame = itertools.accumulate(config.decoder_rates, operator.mul)
    return tuple(draw(block, steps) for block, steps in enumerate(steps_per_frame))
