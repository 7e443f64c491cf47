"""The layers of the codec, with the names and the order of the reference.

Inputs and outputs are (batch, time, channels). Each layer has a `receptive_field`, a `block_size` and an
`output_ratio`. Tiling, packing and streaming derive the context that they need from these.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from . import ops

# True where a step belongs to a clip. Each value covers an equal number of steps. None: all steps belong to a clip.
# Convolutions replace masked steps by zeros, as beyond the ends of an array, so clips in one row stay independent.
PaddingMask = Bool[Array, "_ _"] | None


def _mask(x: Float[Array, "batch time channels"], padding_mask: PaddingMask) -> Float[Array, "batch time channels"]:
    """Replace masked steps by zeros, if there is a mask."""
    if padding_mask is None:
        return x
    return jnp.where(jnp.repeat(padding_mask, x.shape[1] // padding_mask.shape[1], axis=1)[..., None], x, 0)


# None creates an abstract module, whose parameters are `jax.ShapeDtypeStruct`, to load a checkpoint into.
# `nnx.eval_shape` gives the same, but traces every initializer, which takes a second for the 24 kHz model.
Rngs = nnx.Rngs | None


def parameter(rngs: Rngs, shape: tuple[int, ...], init: Callable[[nnx.Rngs], Array]) -> nnx.Param[Array]:
    """Create a parameter with `init`, or an abstract one if `rngs` is None."""
    value: Any = jax.ShapeDtypeStruct(shape, jnp.float32) if rngs is None else init(rngs)
    return nnx.Param(value)


def uniform(rngs: Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param[Array]:
    """Create a parameter with torch's default initializer for kernels and biases: U(-1, 1) / sqrt(fan_in)."""
    return parameter(
        rngs, shape, lambda rngs: jax.random.uniform(rngs.params(), shape, minval=-1, maxval=1) / fan_in**0.5
    )


def constant(rngs: Rngs, shape: tuple[int, ...], value: float) -> nnx.Param[Array]:
    return parameter(rngs, shape, lambda rngs: jnp.full(shape, value))


class Context(NamedTuple):
    """Inputs of a layer in addition to the signal."""

    padding_mask: PaddingMask = None
    # For each decoder block, the noise for each time step of its output, (batch or 1, time). None: no noise.
    noise: Sequence[Float[Array, "_ time"]] | None = None


class Layer(nnx.Module):
    """Base class of layers. Its properties are in steps of the input."""

    @property
    def receptive_field(self) -> int:
        """Steps before and after its own that an output depends on."""
        return 0

    @property
    def block_size(self) -> int:
        """Steps that the layer processes as one block, such as a stride or an attention window."""
        return 1

    @property
    def output_ratio(self) -> Fraction:
        """Output steps per input step."""
        return Fraction(1)

    def __call__(self, x: Float[Array, "batch time _"], context: Context = Context()) -> Float[Array, "batch _ _"]:
        raise NotImplementedError


class Sequential(Layer):
    """Layers in order."""

    @property
    def layers(self) -> list[Layer]:
        """The layers, in the order of the reference."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "batch time _"], context: Context = Context()) -> Float[Array, "batch _ _"]:
        return run(self.layers, x, context)


def run(
    layers: Iterable[Layer], x: Float[Array, "batch time _"], context: Context = Context()
) -> Float[Array, "batch _ _"]:
    """Apply the layers in order."""
    for layer in layers:
        x = layer(x, context)
    return x


def flatten(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Replace each `Sequential` by its layers, recursively."""
    for layer in layers:
        if isinstance(layer, Sequential):
            yield from flatten(layer.layers)
        else:
            yield layer


def output_ratio(layers: Iterable[Layer]) -> Fraction:
    """Return the output ratio of all layers together."""
    return math.prod((layer.output_ratio for layer in flatten(layers)), start=Fraction(1))


def receptive_field(layers: Iterable[Layer]) -> int:
    """Return the receptive field of all layers together, in input steps, rounded up to whole blocks at each layer."""
    steps = Fraction(0)
    for layer in reversed(list(flatten(layers))):
        steps = Fraction(round_up(steps / layer.output_ratio + layer.receptive_field, layer.block_size))
    return int(steps)


def round_up(value: Fraction | int, multiple: int) -> int:
    """Round up to a multiple of `multiple`."""
    return math.ceil(value / multiple) * multiple


class Snake(Layer):
    """Snake activation (https://arxiv.org/abs/2006.08195) with a learned frequency per channel."""

    def __init__(self, channels: int, *, rngs: Rngs):
        self.alpha = constant(rngs, (1, 1, channels), 1.0)

    def __call__(
        self, x: Float[Array, "batch time channels"], context: Context = Context()
    ) -> Float[Array, "batch time channels"]:
        return ops.snake(x, self.alpha[...])


class Tanh(Layer):
    """Hyperbolic tangent."""

    def __call__(
        self, x: Float[Array, "batch time channels"], context: Context = Context()
    ) -> Float[Array, "batch time channels"]:
        return jnp.tanh(x)


class Conv(Layer):
    """Convolution that keeps the length. `groups` is 1, or the number of channels for a depthwise convolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        groups: int = 1,
        use_bias: bool = True,
        rngs: Rngs,
    ):
        self.dilation, self.groups = dilation, groups
        fan_in = kernel_size * in_channels // groups
        self.kernel = uniform(rngs, (kernel_size, in_channels // groups, out_channels), fan_in)
        self.bias = uniform(rngs, (out_channels,), fan_in) if use_bias else None

    @property
    def receptive_field(self) -> int:
        return len(self.kernel) // 2 * self.dilation

    def __call__(
        self, x: Float[Array, "batch time in_channels"], context: Context = Context()
    ) -> Float[Array, "batch time out_channels"]:
        if self.receptive_field:
            x = _mask(x, context.padding_mask)
        apply = ops.conv if self.groups == 1 else ops.depthwise_conv
        y = apply(x, self.kernel[...], self.dilation)
        return y if self.bias is None else y + self.bias[None, None]


class StridedConv(Layer):
    """Convolution with kernel size 2 * stride that downsamples by `stride`.

    As in the reference, a stride of 1 adds one frame.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, rngs: Rngs):
        self.stride = stride
        fan_in = 2 * stride * in_channels
        self.kernel = uniform(rngs, (2 * stride, in_channels, out_channels), fan_in)
        self.bias = uniform(rngs, (out_channels,), fan_in)

    @property
    def receptive_field(self) -> int:
        return math.ceil(self.stride / 2)

    @property
    def block_size(self) -> int:
        return self.stride

    @property
    def output_ratio(self) -> Fraction:
        return Fraction(1, self.stride)

    def __call__(
        self, x: Float[Array, "batch time in_channels"], context: Context = Context()
    ) -> Float[Array, "batch frames out_channels"]:
        return ops.strided_conv(_mask(x, context.padding_mask), self.kernel[...]) + self.bias[None, None]


class TransposedConv(Layer):
    """Transposed convolution with kernel size 2 * stride that upsamples by `stride`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, rngs: Rngs):
        self.stride = stride
        fan_in = 2 * stride * out_channels  # as in torch: from dimension 1 of (in, out, taps)
        self.kernel = uniform(rngs, (2, in_channels, stride, out_channels), fan_in)
        self.bias = uniform(rngs, (out_channels,), fan_in)

    @property
    def receptive_field(self) -> int:
        return 1

    @property
    def output_ratio(self) -> Fraction:
        return Fraction(self.stride)

    def __call__(
        self, x: Float[Array, "batch frames in_channels"], context: Context = Context()
    ) -> Float[Array, "batch time out_channels"]:
        return ops.transposed_conv(_mask(x, context.padding_mask), self.kernel[...]) + self.bias[None, None]


# The kernel size of all convolutions that are neither strided nor pointwise.
KERNEL_SIZE = 7
# The dilations of the residual units of a block.
DILATIONS = (1, 3, 9)


class ResidualUnit(Layer):
    """x + pointwise_conv(snake(dilated_conv(snake(x))))."""

    def __init__(self, channels: int, *, dilation: int, groups: int, rngs: Rngs):
        self.snake1 = Snake(channels, rngs=rngs)
        self.conv1 = Conv(channels, channels, KERNEL_SIZE, dilation=dilation, groups=groups, rngs=rngs)
        self.snake2 = Snake(channels, rngs=rngs)
        self.conv2 = Conv(channels, channels, 1, rngs=rngs)

    @property
    def layers(self) -> list[Layer]:
        return [self.snake1, self.conv1, self.snake2, self.conv2]

    @property
    def receptive_field(self) -> int:
        return receptive_field(self.layers)

    def __call__(
        self, x: Float[Array, "batch time channels"], context: Context = Context()
    ) -> Float[Array, "batch time channels"]:
        return x + run(self.layers, x, context)


def _residual_units(channels: int, *, depthwise: bool, rngs: Rngs) -> nnx.List[ResidualUnit]:
    groups = channels if depthwise else 1
    return nnx.List([ResidualUnit(channels, dilation=d, groups=groups, rngs=rngs) for d in DILATIONS])


class EncoderBlock(Sequential):
    """Residual units, then a strided convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, depthwise: bool, rngs: Rngs):
        self.residual_units = _residual_units(in_channels, depthwise=depthwise, rngs=rngs)
        self.snake = Snake(in_channels, rngs=rngs)
        self.conv = StridedConv(in_channels, out_channels, stride, rngs=rngs)

    @property
    def layers(self) -> list[Layer]:
        return [*self.residual_units, self.snake, self.conv]


class NoiseBlock(Layer):
    """Add noise, scaled in each channel by a projection of the signal. All channels share one draw per time step."""

    def __init__(self, channels: int, *, index: int, rngs: Rngs):
        self.index = index  # the position of its decoder block in the decoder
        self.linear = Conv(channels, channels, 1, use_bias=False, rngs=rngs)

    @jax.named_scope("noise")
    def __call__(
        self, x: Float[Array, "batch time channels"], context: Context = Context()
    ) -> Float[Array, "batch time channels"]:
        if context.noise is None:
            return x
        return x + context.noise[self.index][..., None].astype(x.dtype) * self.linear(x)


class DecoderBlock(Sequential):
    """A transposed convolution, noise, then residual units."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, index: int, noise: bool, depthwise: bool, rngs: Rngs
    ):
        self.snake = Snake(in_channels, rngs=rngs)
        self.conv = TransposedConv(in_channels, out_channels, stride, rngs=rngs)
        self.noise = NoiseBlock(out_channels, index=index, rngs=rngs) if noise else None
        self.residual_units = _residual_units(out_channels, depthwise=depthwise, rngs=rngs)

    @property
    def layers(self) -> list[Layer]:
        noise = [] if self.noise is None else [self.noise]
        return [self.snake, self.conv, *noise, *self.residual_units]
