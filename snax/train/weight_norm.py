"""Convolutions as gain and direction, which is what the reference trains (Salimans and Kingma, 2016, arXiv:1602.07868).

A model has plain kernels. For training they are taken apart once, and put together in every step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from ..codec.model import SNAC
from ..weights.torch_weights import named_tensors


class Normed(NamedTuple):
    """What training moves: gains, under the names that the kernels have in the reference, each with all of its kernel's
    axes but one of length 1; and a model with directions, of any length, where it has kernels."""

    gains: dict[str, Float[Array, "..."]]
    directions: SNAC


def unfold(model: SNAC) -> Normed:
    """The model taken apart: directions are the kernels, gains their lengths, as when torch begins with it."""
    gains = {
        tensor.name: _length(tensor.parameter[...], tensor.axes[0])
        for tensor in named_tensors(model)
        if tensor.weight_norm
    }
    return Normed(gains, model)


def fold(normed: Normed) -> SNAC:
    """The model that gains and directions stand for: a differentiable function of both."""
    model = jax.tree.map(lambda parameter: parameter, normed.directions)  # a copy, to be changed
    for tensor in named_tensors(model):
        if tensor.weight_norm:
            direction = tensor.parameter[...]
            gain = normed.gains[tensor.name] / _length(direction, tensor.axes[0])
            tensor.parameter.set_value(direction * gain)
    return model


def _length(direction: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Over every axis but the one that is torch's first: output channels, or those that come in if it is transposed."""
    others = tuple(i for i in range(direction.ndim) if i != axis)
    return jnp.sqrt(jnp.square(direction).sum(others, keepdims=True))
