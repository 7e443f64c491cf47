"""The reference's state dict, as NumPy arrays, to a SNAC and back. Imports no torch.

The reference keeps each convolution as a gain and a direction (weight norm). They are multiplied out on the way in and
taken apart on the way out: the forward pass never sees them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..codec.attention import LocalMHA, rotary_frequencies
from ..codec.config import SNACConfig
from ..codec.layers import Conv, NoiseBlock, ResidualUnit, Sequential, Snake, StridedConv, Tanh, TransposedConv
from ..codec.model import SNAC, Decoder
from ..codec.quantizer import VectorQuantize

# Gain and direction as torch names them today, and as it did before 2.0.
_TODAY = (".parametrizations.weight.original0", ".parametrizations.weight.original1")
_OLDER = (".weight_g", ".weight_v")


def from_torch(state_dict: Mapping[str, np.ndarray], config: SNACConfig, *, precision: str = "highest") -> SNAC:
    """The SNAC, in float32, whose parameters `state_dict` holds under the reference's names.

    Raises:
        ValueError: unless names and shapes are exactly those of `config` and all values are finite. Lists everything
            that is missing, unexpected, mis-shaped or not finite at once.
    """
    model = SNAC(config, precision=precision, rngs=None)
    remaining, problems = dict(state_dict), []

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in remaining:
            problems.append(f"missing: {name}")
        elif (array := remaining.pop(name)).shape != shape:
            problems.append(f"mis-shaped: {name} {array.shape}, expected {shape}")
        elif not np.isfinite(array32 := array.astype(np.float32)).all():
            problems.append(f"not finite: {name}")
        else:
            return array32
        return np.ones(shape, np.float32)

    for tensor in named_tensors(model):
        if tensor.weight_norm:
            gain_name, direction_name = _norm_names(tensor.name, remaining)
            gain = take(gain_name, _gain_shape(tensor.shape))
            weight = _fold(gain, take(direction_name, tensor.shape))
            if not np.isfinite(weight).all():
                problems.append(f"of no length, so without a direction: {direction_name}")
        else:
            weight = take(tensor.name, tensor.shape)
        tensor.parameter.set_value(jnp.asarray(tensor.from_torch(weight)))

    for name in _buffer_names(model):
        frequencies = rotary_frequencies()
        if not np.allclose(take(name, frequencies.shape), frequencies, rtol=1e-2):  # bfloat16 files are 0.4 % off
            problems.append(f"not rotary frequencies of theta 10000: {name}")

    problems += [f"unexpected: {name} {array.shape}" for name, array in remaining.items()]
    if problems:
        raise ValueError(
            f"not the weights of this configuration, {len(problems)} differences:\n  " + "\n  ".join(problems)
        )
    return model


def to_torch(model: SNAC) -> dict[str, np.ndarray]:
    """`from_torch`'s inverse: the state dict, in float32, that the reference's `load_state_dict` takes strictly.

    Directions are the weights themselves and gains their norms: the function is the same to rounding, while a gain and
    a direction that went in come back with the direction's length changed.
    """
    state_dict = {name: rotary_frequencies() for name in _buffer_names(model)}
    for tensor in named_tensors(model):
        weight = tensor.to_torch(np.asarray(tensor.parameter.get_value(), np.float32))
        if tensor.weight_norm:
            gain_name, direction_name = _norm_names(tensor.name, ())
            state_dict[gain_name], state_dict[direction_name] = _unfold(weight)
        else:
            state_dict[tensor.name] = weight
    return state_dict


class NamedTensor(NamedTuple):
    """A parameter of ours and where torch keeps it: `parameter.transpose(axes)`, all axes after the third merged."""

    name: str
    parameter: Any  # an nnx.Param
    axes: tuple[int, ...]
    weight_norm: bool = False

    @property
    def split_shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape[axis] for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.split_shape[:2], *([math.prod(self.split_shape[2:])] if len(self.axes) > 2 else [])

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.transpose(self.axes)).reshape(self.shape)

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(self.split_shape).transpose(np.argsort(self.axes))


def named_tensors(model: SNAC) -> Iterator[NamedTensor]:
    """Every parameter under the name that it has in the reference."""
    yield from _walk("encoder", model.encoder)
    yield from _walk("decoder", model.decoder)
    yield from _sequential("quantizer.quantizers", model.quantizer.quantizers)


def _sequential(prefix: str, modules: Iterable[nnx.Module]) -> Iterator[NamedTensor]:
    """torch numbers the modules of a Sequential."""
    for i, module in enumerate(modules):
        yield from _walk(f"{prefix}.{i}", module)


def _walk(prefix: str, module: nnx.Module) -> Iterator[NamedTensor]:
    match module:
        case Decoder():
            yield from _sequential(f"{prefix}.model", module.layers)
        case Sequential() | ResidualUnit():
            yield from _sequential(f"{prefix}.block", module.layers)
        case NoiseBlock():
            yield from _walk(f"{prefix}.linear", module.linear)
        case VectorQuantize():
            yield from _walk(f"{prefix}.in_proj", module.in_proj)
            yield from _walk(f"{prefix}.out_proj", module.out_proj)
            yield NamedTensor(f"{prefix}.codebook.weight", module.codebook, (0, 1))
        case LocalMHA():
            yield NamedTensor(f"{prefix}.norm.weight", module.norm.scale, (0,))
            yield NamedTensor(f"{prefix}.norm.bias", module.norm.bias, (0,))
            yield NamedTensor(f"{prefix}.to_qkv.weight", module.to_qkv.kernel, (1, 0))
            yield NamedTensor(f"{prefix}.to_out.weight", module.to_out.kernel, (1, 0))
        case Snake():
            yield NamedTensor(f"{prefix}.alpha", module.alpha, (0, 2, 1))
        case Conv() | StridedConv():
            yield NamedTensor(f"{prefix}.weight", module.kernel, (2, 1, 0), weight_norm=True)
            if module.bias is not None:
                yield NamedTensor(f"{prefix}.bias", module.bias, (0,))
        case TransposedConv():
            yield NamedTensor(f"{prefix}.weight", module.kernel, (1, 3, 0, 2), weight_norm=True)
            yield NamedTensor(f"{prefix}.bias", module.bias, (0,))
        case Tanh():
            pass
        case _:
            raise TypeError(f"no torch name for a {type(module).__name__}")


def _buffer_names(model: SNAC) -> list[str]:
    """Constants that the reference keeps in its state dict, beside the weights of the attention they belong to."""
    names = [tensor.name for tensor in named_tensors(model) if tensor.name.endswith(".to_qkv.weight")]
    return [name.replace("to_qkv.weight", "rel_pos.inv_freq") for name in names]


def _norm_names(name: str, given: Iterable[str]) -> list[str]:
    """The names of a weight's gain and direction: the older ones if `given` has one of them."""
    layer = name.removesuffix(".weight")
    older = any(layer + suffix in given for suffix in _OLDER)
    return [layer + suffix for suffix in (_OLDER if older else _TODAY)]


def _gain_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], *(1 for _ in shape[1:])


def _norm(direction: np.ndarray) -> np.ndarray:
    """Length over every dimension but the first: the input channels for a transposed convolution, as in torch."""
    axes = tuple(range(1, direction.ndim))
    return np.sqrt(np.square(direction, dtype=np.float64).sum(axes, keepdims=True))


def _fold(gain: np.ndarray, direction: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):  # a direction of length 0 is reported by the caller
        return (direction * (gain / _norm(direction))).astype(np.float32)


def _unfold(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norm = _norm(weight)
    direction = np.where(norm == 0, 1, weight)  # a channel that is all zeros: any direction, gain 0
    return norm.astype(np.float32), direction.astype(np.float32)
