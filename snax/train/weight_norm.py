"""Weight normalization of convolutions, as in the reference (Salimans and Kingma, 2016, arXiv:1602.07868).

A `SNAC` has plain kernels. They are split into magnitude `g` and direction `v` before training, and merged in each
training step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..codec.model import SNAC
from ..weights.torch_weights import named_tensors


class WeightNormed(NamedTuple):
    """The trained parameters. A kernel is `g * v / |v|`.

    Attributes:
        g: the magnitude of each kernel, by the kernel's name in the reference. All axes but one have length 1.
        v: a model with directions instead of kernels. Directions can have any norm.
    """

    g: dict[str, Float[Array, "..."]]
    v: SNAC


def split(model: SNAC) -> WeightNormed:
    """Split each kernel into magnitude and direction. The direction is the kernel itself, as in torch."""
    g = {
        tensor.name: _norm(tensor.parameter[...], tensor.axes[0])
        for tensor in named_tensors(model)
        if tensor.weight_norm
    }
    return WeightNormed(g, model)


def merge(normed: WeightNormed) -> SNAC:
    """Compute the model with plain kernels. Differentiable with respect to magnitudes and directions."""
    model = jax.tree.map(lambda parameter: parameter, normed.v)  # a copy, which is modified below
    for tensor in named_tensors(model):
        if tensor.weight_norm:
            v = tensor.parameter[...]
            tensor.parameter.set_value(v * (normed.g[tensor.name] / _norm(v, tensor.axes[0])))
    return model


def _norm(v: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Return the norm over all axes but `axis`, which is torch's first: output channels, or input channels of a
    transposed convolution."""
    other_axes = tuple(i for i in range(v.ndim) if i != axis)
    return jnp.sqrt(jnp.square(v).sum(other_axes, keepdims=True))
