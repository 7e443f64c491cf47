"""Convert the reference's state dict, as NumPy arrays, to a SNAC and back. Does not import torch.

The reference stores the kernel of each convolution as magnitude `g` and direction `v` (weight normalization, Salimans
and Kingma, 2016, arXiv:1602.07868). They are merged when weights are loaded and split when weights are exported, so the
forward pass uses plain kernels.
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

# The suffixes of g and v in torch.nn.utils.parametrizations.weight_norm, and before torch 2.0.
_PARAMETRIZATION_SUFFIXES = (".parametrizations.weight.original0", ".parametrizations.weight.original1")
_LEGACY_SUFFIXES = (".weight_g", ".weight_v")


def from_torch(state_dict: Mapping[str, np.ndarray], config: SNACConfig, *, precision: str = "highest") -> SNAC:
    """Build a SNAC in float32 from the reference's state dict.

    Args:
        state_dict: arrays of any floating-point dtype under the reference's names.
        config: the configuration of the model.
        precision: see `snax.load`.

    Raises:
        ValueError: if names or shapes do not match `config`, or if values are not finite. The message lists all
            problems at once.
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
            g_name, v_name = _weight_norm_names(tensor.name, remaining)
            g = take(g_name, _g_shape(tensor.shape))
            weight = _merge(g, take(v_name, tensor.shape))
            if not np.isfinite(weight).all():
                problems.append(f"norm of zero in weight normalization: {v_name}")
        else:
            weight = take(tensor.name, tensor.shape)
        tensor.parameter.set_value(jnp.asarray(tensor.from_torch(weight)))

    for name in _buffer_names(model):
        frequencies = rotary_frequencies()
        if not np.allclose(take(name, frequencies.shape), frequencies, rtol=1e-2):  # bfloat16 rounds by up to 0.4 %
            problems.append(f"not the rotary frequencies of theta = 10000: {name}")

    problems += [f"unexpected: {name} {array.shape}" for name, array in remaining.items()]
    if problems:
        raise ValueError(
            f"The weights do not match the configuration ({len(problems)} differences):\n  " + "\n  ".join(problems)
        )
    return model


def to_torch(model: SNAC) -> dict[str, np.ndarray]:
    """Build the reference's state dict, in float32. The inverse of `from_torch`.

    The reference's `load_state_dict` accepts it with `strict=True`. For weight normalization, `v` is the kernel and `g`
    its norm, as when torch adds weight norm to a layer. The function is the same up to rounding, but the norm of `v`
    may differ from the state dict that the model was loaded from.
    """
    state_dict = {name: rotary_frequencies() for name in _buffer_names(model)}
    for tensor in named_tensors(model):
        weight = tensor.to_torch(np.asarray(tensor.parameter.get_value(), np.float32))
        if tensor.weight_norm:
            g_name, v_name = _weight_norm_names(tensor.name, ())
            state_dict[g_name], state_dict[v_name] = _split(weight)
        else:
            state_dict[tensor.name] = weight
    return state_dict


class NamedTensor(NamedTuple):
    """A parameter and its layout in the reference.

    The reference's tensor is `parameter.transpose(axes)`, with all axes from the third on merged into one.
    """

    name: str  # in the reference
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
    """Yield every parameter with its name in the reference."""
    yield from _walk("encoder", model.encoder)
    yield from _walk("decoder", model.decoder)
    yield from _sequential("quantizer.quantizers", model.quantizer.quantizers)


def _sequential(prefix: str, modules: Iterable[nnx.Module]) -> Iterator[NamedTensor]:
    """Name modules by their index, as torch does in a Sequential."""
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
    """Return the names of the rotary frequencies, one for each attention layer."""
    names = [tensor.name for tensor in named_tensors(model) if tensor.name.endswith(".to_qkv.weight")]
    return [name.replace("to_qkv.weight", "rel_pos.inv_freq") for name in names]


def _weight_norm_names(name: str, existing: Iterable[str]) -> list[str]:
    """Return the names of a weight's g and v: the legacy ones if `existing` contains one of them."""
    layer = name.removesuffix(".weight")
    legacy = any(layer + suffix in existing for suffix in _LEGACY_SUFFIXES)
    return [layer + suffix for suffix in (_LEGACY_SUFFIXES if legacy else _PARAMETRIZATION_SUFFIXES)]


def _g_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], *(1 for _ in shape[1:])


def _norm(v: np.ndarray) -> np.ndarray:
    """Return the norm over all axes but the first, which is the input channels of a transposed convolution in torch."""
    axes = tuple(range(1, v.ndim))
    return np.sqrt(np.square(v, dtype=np.float64).sum(axes, keepdims=True))


def _merge(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the kernel `g * v / |v|`."""
    with np.errstate(divide="ignore", invalid="ignore"):  # the caller reports a norm of zero
        return (v * (g / _norm(v))).astype(np.float32)


def _split(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return g and v of a kernel."""
    g = _norm(weight)
    v = np.where(g == 0, 1, weight)  # a kernel of zeros has g = 0, and v must not have a norm of zero
    return g.astype(np.float32), v.astype(np.float32)
