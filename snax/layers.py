"""The codec's building blocks, named and ordered as in the reference."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Bool, Float

from . import ops

# Which stretches of time are inside of a clip; each value covers an equal number of steps. None: all of them.
# Convolutions see zeros in the others, as beyond the ends of an array, so that a clip does not see what is around it.
Valid = Bool[Array, "_ _"] | None


def _inside(x: Float[Array, "batch time channels"], valid: Valid) -> Float[Array, "batch time channels"]:
    """x with zeros outside of the clips."""
    if valid is None:
        return x
    return jnp.where(jnp.repeat(valid, x.shape[1] // valid.shape[1], axis=1)[..., None], x, 0)


# None makes an abstract module, whose parameters are `jax.ShapeDtypeStruct`, for a checkpoint to fill. `nnx.eval_shape`
# gives the same, but traces every initializer, which takes a second for the 24 kHz model.
Rngs = nnx.Rngs | None


def parameter(rngs: Rngs, shape: tuple[int, ...], init: Callable[[nnx.Rngs], Array]) -> nnx.Param[Array]:
    """A parameter of this shape, made by `init`, or abstract without `rngs`."""
    value: Any = jax.ShapeDtypeStruct(shape, jnp.float32) if rngs is None else init(rngs)
    return nnx.Param(value)


def uniform(rngs: Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param[Array]:
    """torch's default for linear layers, convolutions and their biases: U(-1, 1) / sqrt(fan_in)."""
    return parameter(
        rngs, shape, lambda rngs: jax.random.uniform(rngs.params(), shape, minval=-1, maxval=1) / fan_in**0.5
    )


def constant(rngs: Rngs, shape: tuple[int, ...], value: float) -> nnx.Param[Array]:
    return parameter(rngs, shape, lambda rngs: jnp.full(shape, value))


class Snake(nnx.Module):
    """Periodic activation with a learned frequency for each channel."""

    def __init__(self, channels: int, *, rngs: Rngs):
        self.alpha = constant(rngs, (1, 1, channels), 1.0)

    def __call__(self, x: Float[Array, "batch time channels"]) -> Float[Array, "batch time channels"]:
        return ops.snake(x, self.alpha[...])


class Conv(nnx.Module):
    """Convolution that keeps the length; with `groups` = channels, each channel by itself."""

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

    def __call__(
        self, x: Float[Array, "batch time in_channels"], valid: Valid = None
    ) -> Float[Array, "batch time out_channels"]:
        if len(self.kernel) > 1:
            x = _inside(x, valid)
        apply = ops.conv if self.groups == 1 else ops.depthwise_conv
        y = apply(x, self.kernel[...], self.dilation)
        return y if self.bias is None else y + self.bias[None, None]


class StridedConv(nnx.Module):
    """Convolution that leaves one frame of every `stride`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, rngs: Rngs):
        fan_in = 2 * stride * in_channels
        self.kernel = uniform(rngs, (2 * stride, in_channels, out_channels), fan_in)
        self.bias = uniform(rngs, (out_channels,), fan_in)

    def __call__(
        self, x: Float[Array, "batch time in_channels"], valid: Valid = None
    ) -> Float[Array, "batch frames out_channels"]:
        return ops.strided_conv(_inside(x, valid), self.kernel[...]) + self.bias[None, None]


class TransposedConv(nnx.Module):
    """Transposed convolution that makes `stride` samples of every frame."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, rngs: Rngs):
        fan_in = 2 * stride * out_channels  # as torch counts it: dimension 1 of (in, out, taps)
        self.kernel = uniform(rngs, (2, in_channels, stride, out_channels), fan_in)
        self.bias = uniform(rngs, (out_channels,), fan_in)

    def __call__(
        self, x: Float[Array, "batch frames in_channels"], valid: Valid = None
    ) -> Float[Array, "batch time out_channels"]:
        return ops.transposed_conv(_inside(x, valid), self.kernel[...]) + self.bias[None, None]


class ResidualUnit(nnx.Module):
    """x + Conv1(Snake(Conv7(Snake(x)))), the first convolution dilated."""

    def __init__(self, channels: int, *, dilation: int, groups: int, rngs: Rngs):
        self.snake1 = Snake(channels, rngs=rngs)
        self.conv1 = Conv(channels, channels, 7, dilation=dilation, groups=groups, rngs=rngs)
        self.snake2 = Snake(channels, rngs=rngs)
        self.conv2 = Conv(channels, channels, 1, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time channels"], valid: Valid = None
    ) -> Float[Array, "batch time channels"]:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x), valid)))


def _residual_units(channels: int, *, depthwise: bool, rngs: Rngs) -> nnx.List[ResidualUnit]:
    groups = channels if depthwise else 1
    return nnx.List([ResidualUnit(channels, dilation=d, groups=groups, rngs=rngs) for d in (1, 3, 9)])


class EncoderBlock(nnx.Module):
    """Three residual units, then one frame, of more channels, for every `stride` of them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, depthwise: bool, rngs: Rngs):
        self.residual_units = _residual_units(in_channels, depthwise=depthwise, rngs=rngs)
        self.snake = Snake(in_channels, rngs=rngs)
        self.conv = StridedConv(in_channels, out_channels, stride, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch time in_channels"], valid: Valid = None
    ) -> Float[Array, "batch frames out_channels"]:
        for unit in self.residual_units:
            x = unit(x, valid)
        return self.conv(self.snake(x), valid)


class NoiseBlock(nnx.Module):
    """Adds noise whose loudness in each channel depends on the signal; one draw a time step, shared by all channels."""

    def __init__(self, channels: int, *, rngs: Rngs):
        self.linear = Conv(channels, channels, 1, use_bias=False, rngs=rngs)

    @jax.named_scope("noise")
    def __call__(
        self, x: Float[Array, "batch time channels"], noise: Float[Array, "_ time"]
    ) -> Float[Array, "batch time channels"]:
        return x + noise[..., None].astype(x.dtype) * self.linear(x)


class DecoderBlock(nnx.Module):
    """`EncoderBlock` backwards, with noise after the transposed convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, noise: bool, depthwise: bool, rngs: Rngs):
        self.snake = Snake(in_channels, rngs=rngs)
        self.conv = TransposedConv(in_channels, out_channels, stride, rngs=rngs)
        self.noise = NoiseBlock(out_channels, rngs=rngs) if noise else None
        self.residual_units = _residual_units(out_channels, depthwise=depthwise, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch frames in_channels"],
        noise: Float[Array, "_ time"] | None = None,
        valid: Valid = None,
    ) -> Float[Array, "batch time out_channels"]:
        x = self.conv(self.snake(x), valid)
        if self.noise is not None and noise is not None:
            x = self.noise(x, noise)
        for unit in self.residual_units:
            x = unit(x, valid)
        return x
