"""The arithmetic of the codec: pure functions on time-major arrays, `(batch, time, channels)`.

Convolutions are matrix products and shifted sums, never `lax.conv_general_dilated`: XLA's own are about ten times
slower on a CPU and move two to three times the bytes on a TPU. All padding is zeros, as in the reference.
Each function names itself in profiles and compiled programs.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from .config import strided_length

# pi in two parts. k * PI_HI is exact for |k| < 2**16, which keeps the phase of large arguments, where
# k * float32(pi) would be off by up to |k| * 9e-8: trained alphas take it into the hundreds of radians.
PI_HI = 3.140625
PI_LO = math.pi - PI_HI

# sin(r)**2 / r**2 on |r| <= pi / 2 as a polynomial in r**2: least squares at 400 Chebyshev nodes in float64.
# Its error, 1e-10, is far below float32's rounding; one term less would show in the gradient (2.5e-6).
_SIN_SQUARED = (
    1.0,
    -0.3333333432674408,
    0.04444441944360733,
    -0.0031745433807373047,
    0.00014102387649472803,
    -4.233699200995034e-06,
    8.133810780464046e-08,
)


def sin_squared(t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sin(t)**2 to 3e-7, its gradient to 1e-6, for float32 |t| up to 1000.

    Range reduction and a polynomial: they vectorise and fuse with their neighbours, which XLA's `sin` does not.
    """
    k = jnp.round(t * (1 / math.pi))
    r = (t - k * PI_HI) - k * PI_LO
    square = r * r
    polynomial = jnp.full_like(square, _SIN_SQUARED[-1])
    for coefficient in reversed(_SIN_SQUARED[:-1]):
        polynomial = polynomial * square + coefficient
    return polynomial * square


@jax.named_scope("snake")
def snake(
    x: Float[Array, "batch time channels"], alpha: Float[Array, "1 1 channels"]
) -> Float[Array, "batch time channels"]:
    """x + sin(alpha * x)**2 / alpha (https://arxiv.org/abs/2006.08195), in float32 whatever the dtype of x."""
    x32, alpha32 = x.astype(jnp.float32), alpha.astype(jnp.float32)
    return (x32 + sin_squared(alpha32 * x32) / (alpha32 + 1e-9)).astype(x.dtype)


def _shifted(x: Array, taps: int, dilation: int) -> list[Array]:
    """x as each tap of a convolution to the same length sees it: item i is x from `i - taps // 2` dilated steps on."""
    time = x.shape[1]
    reach = (taps - 1) * dilation // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    return [padded[:, i * dilation : i * dilation + time] for i in range(taps)]


@jax.named_scope("depthwise_conv")
def depthwise_conv(
    x: Float[Array, "batch time channels"], kernel: Float[Array, "taps 1 channels"], dilation: int = 1
) -> Float[Array, "batch time channels"]:
    """Convolution of each channel with its own taps (an odd number), to the same length."""
    shifted = _shifted(x, len(kernel), dilation)
    return functools.reduce(jnp.add, [y * tap for y, tap in zip(shifted, kernel[:, None], strict=True)])


@jax.named_scope("conv")
def conv(
    x: Float[Array, "batch time in_channels"], kernel: Float[Array, "taps in_channels out_channels"], dilation: int = 1
) -> Float[Array, "batch time out_channels"]:
    """Convolution (an odd number of taps) to the same length, as one product with the shifts on the narrower side."""
    taps, in_channels, out_channels = kernel.shape
    if taps == 1:
        return x @ kernel[0]
    if in_channels <= out_channels:
        columns = jnp.concatenate(_shifted(x, taps, dilation), axis=-1)
        return columns @ kernel.reshape(taps * in_channels, out_channels)
    products = x @ kernel.swapaxes(0, 1).reshape(in_channels, taps * out_channels)
    shifted = _shifted(products, taps, dilation)
    return functools.reduce(jnp.add, [y[..., i * out_channels : (i + 1) * out_channels] for i, y in enumerate(shifted)])


# On a CPU, from this many frames on, the arithmetic that `two_taps` saves is worth the passes over the kernel that it
# costs: 10 % of encoding 10 s on two cores, where 1 s would take a third longer. 200 and 1000 do as well.
MANY_FRAMES = 512


def two_taps(
    x: Float[Array, "batch _ in_channels"], kernel: Float[Array, "2 in_channels out_channels"], *, flipped: bool = False
) -> Float[Array, "batch frames out_channels"]:
    """Each frame @ kernel[0] + the next @ kernel[1]; `flipped`: each @ kernel[1] + the next @ kernel[0]."""
    batch, frames, (_, in_channels, out_channels) = len(x), x.shape[1] - 1, kernel.shape

    def one_product(x: Array, kernel: Array) -> Array:
        neighbours = [x[:, :-1], x[:, 1:]]
        joined = jnp.concatenate(neighbours[::-1] if flipped else neighbours, axis=-1)
        return joined @ kernel.reshape(2 * in_channels, out_channels)  # as it lies in memory, without a copy

    def three_for_two(x: Array, kernel: Array) -> Array:
        # Winograd's minimal filtering F(2, 2) (https://arxiv.org/abs/1509.09308): the middle one of three frames meets
        # the sum of the kernels, and what its neighbours differ from it by meets one of them.
        this, following = (kernel[1], kernel[0]) if flipped else kernel
        x = jnp.pad(x, ((0, 0), (0, frames % 2), (0, 0)))
        first, middle, last = x[:, :-1:2], x[:, 1::2], x[:, 2::2]
        both = middle @ (this + following)
        y = jnp.stack([both + (first - middle) @ this, both + (last - middle) @ following], axis=2)
        return y.reshape(batch, -1, out_channels)[:, :frames]

    if batch * frames < MANY_FRAMES or x.dtype != jnp.float32:  # narrower differences would lose digits
        return one_product(x, kernel)
    # XLA's estimate for a TPU is 5 % fewer cycles for `three_for_two`, but it takes a third longer to compile.
    return lax.platform_dependent(x, kernel, cpu=three_for_two, default=one_product)


@jax.named_scope("strided_conv")
def strided_conv(
    x: Float[Array, "batch time in_channels"], kernel: Float[Array, "taps in_channels out_channels"]
) -> Float[Array, "batch frames out_channels"]:
    """Convolution of 2 * stride taps and padding ceil(stride / 2), on blocks of `stride` samples."""
    stride = len(kernel) // 2
    batch, time, in_channels = x.shape
    frames = strided_length(time, stride)
    left = math.ceil(stride / 2)
    right = (frames + 1) * stride - left - time  # negative where the last samples reach no frame
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (left, right, 0), (0, 0, 0)))
    blocks = padded.reshape(batch, frames + 1, stride * in_channels)
    return two_taps(blocks, kernel.reshape(2, stride * in_channels, -1))


@jax.named_scope("transposed_conv")
def transposed_conv(
    x: Float[Array, "batch frames in_channels"], kernel: Float[Array, "2 in_channels stride out_channels"]
) -> Float[Array, "batch time out_channels"]:
    """Transposed convolution of 2 * stride taps to `frames * stride` samples, padding ceil(stride / 2).

    Each frame makes two blocks of `stride` samples, and the second is added to the next frame's first. The kernel is
    kept in these two halves, so that the products need no transposed copy of it.
    """
    _, in_channels, stride, out_channels = kernel.shape
    batch, frames, _ = x.shape
    halves = kernel.reshape(2, in_channels, stride * out_channels)
    blocks = two_taps(jnp.pad(x, ((0, 0), (1, 1), (0, 0))), halves, flipped=True)
    samples = blocks.reshape(batch, (frames + 1) * stride, out_channels)
    left = math.ceil(stride / 2)
    return samples[:, left : left + frames * stride]
