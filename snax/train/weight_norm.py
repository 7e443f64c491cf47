"""Weight normalization of convolutions, as the reference trains them (Salimans and Kingma, 2016, arXiv:1602.07868).

A model has plain kernels. They are split into magnitude `g` and direction `v` before training, and merged in each step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..codec.model import SNAC
from ..weights.torch_weights import named_tensors


class WeightNormed(NamedTuple):
    """The trained parameters: kernels are `g * v / |v|`.

    Attributes:
        g: magnitudes, by the name that the kernel has in the reference. All axes but one have length 1.
        v: a model that has directions, of any length, in the place of kernels.
    """

    g: dict[str, Float[Array, "..."]]
    v: SNAC


def split(model: SNAC) -> WeightNormed:
    """Split each kernel into magnitude and direction. The direction is the kernel, as when torch adds weight norm."""
    g = {
        tensor.name: _length(tensor.parameter[...], tensor.axes[0])
        for tensor in named_tensors(model)
        if tensor.weight_norm
    }
    return WeightNormed(g, model)


def merge(normed: WeightNormed) -> SNAC:
    """Compute the model with plain kernels. Differentiable by magnitudes and directions."""
    model = jax.tree.map(lambda parameter: parameter, normed.v)  # a copy, to be changed
    for tensor in named_tensors(model):
        if tensor.weight_norm:
            direction = tensor.parameter[...]
            gain = normed.g[tensor.name] / _length(direction, tensor.axes[0])
            tensor.parameter.set_value(direction * gain)
    return model


def _length(direction: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The norm over every axis but torch's first: output channels, or input channels of a transposed convolution."""
    others = tuple(i for i in range(direction.ndim) if i != axis)
    return jnp.sqrt(jnp.square(direction).sum(others, keepdims=True))
