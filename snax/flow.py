"""Some new input of a stream on its way through the layers, each of which keeps what it still needs of the past."""

from collections.abc import Callable, Sequence
from fractions import Fraction

import jax.numpy as jnp
from jax import Array

from .layers import Conv, ResidualUnit

# Latent frames farther than this from an end of the stream do not see it: more than any codec's reach. (To count on
# would overflow 32 bits of samples within a day.)
FAR = 4096


def reach_of(conv: Conv) -> int:
    return len(conv.kernel) // 2 * conv.dilation


class Flow:
    """Some new input on its way through the layers.

    Args:
        x: its values, (batch, steps, channels).
        rate: steps of a latent frame.
        frames: latent frames that came before.
        ended: whether `x` is only what follows the end of the stream.
        past: the caches that it left last time; None: zeros.
    """

    def __init__(self, x: Array, rate: int, frames: int | Array, ended: bool | Array, past: Sequence[Array] | None):
        self.x, self.rate = x, rate
        self.delay = 0  # steps that x is behind the input
        self.caches: list[Array] = []
        self._past = past
        self._before = jnp.minimum(frames, FAR)
        self._after = jnp.where(ended, 0, FAR)

    def through(self, layer: Callable[[Array, Array], Array], reach: int, *, multiple: int = 1) -> None:
        """x becomes `layer(x, valid)`, which sees `reach` steps to both sides, and as much later as that takes.

        `multiple`: of which the delay must be one before the layer, in steps.
        """
        batch, steps, channels = self.x.shape
        delay = -(-(self.delay + reach) // multiple) * multiple
        kept = delay - self.delay + reach
        x = self.x
        if kept:
            cache = jnp.zeros((batch, kept, channels), x.dtype) if self._past is None else self._past[len(self.caches)]
            x = jnp.concatenate([cache, x], axis=1)
            self.caches.append(x[:, steps:])
        x = x[:, : steps + 2 * reach]
        place = jnp.arange(x.shape[1]) - delay - reach  # counted from the first step of the new input
        valid = (place >= -self._before * self.rate) & (place < self._after * self.rate)
        y = layer(x, valid[None])
        up = Fraction(y.shape[1], x.shape[1])
        self.x = y[:, int(reach * up) : int((reach + steps) * up)]
        self.rate, self.delay = int(self.rate * up), int(delay * up)

    def units(self, residual_units: Sequence[ResidualUnit]) -> None:
        for unit in residual_units:
            self.through(unit, reach_of(unit.conv1))

    def wait(self, multiple: int) -> None:
        """Delays x to a multiple of so many steps."""
        self.through(lambda x, _: x, 0, multiple=multiple)

    def latent_frames(self) -> tuple[int, int]:
        """How far back the latent frame lies in which x begins, and how many frames x touches from there on."""
        before = -(-self.delay // self.rate)
        return before, before + -(-(self.x.shape[1] - self.delay) // self.rate)
