"""The operations of the codec: pure functions on (batch, time, channels) arrays.

Convolutions are matrix products and shifted sums. XLA's own convolutions (`lax.conv_general_dilated`) are about ten
times slower on a CPU and move two to three times the bytes on a TPU. All padding is zeros, as in the reference.
Named scopes show the functions in profiles and compiled programs.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from .config import strided_length

# pi in two parts. k * PI_HI is exact for |k| < 2**16, so large arguments keep their phase; k * float32(pi) would be off
# by up to |k| * 9e-8. With trained alphas, arguments reach hundreds of radians.
PI_HI = 3.140625
PI_LO = math.pi - PI_HI

# sin(r)**2 / r**2 on |r| <= pi / 2 as a polynomial in r**2, fitted by least squares at 400 Chebyshev nodes in float64.
# Its error of 1e-10 is far below float32's rounding. With one term less, the gradient would be off by 2.5e-6.
_SIN_SQUARED = (
    1.0,
    -0.3333333432674408,
    0.04444441944360733,
    -0.0031745433807373047,
    0.00014102387649472803,
    -4.233699200995034e-06,
    8.133810780464046e-08,
)
# The coefficients of its derivative, sin(2 * r) / r.
_SIN_TWICE = tuple((2 * i + 2) * coefficient for i, coefficient in enumerate(_SIN_SQUARED))


def _reduced(t: Array) -> Array:
    """Subtract the nearest multiple of pi."""
    k = jnp.round(t * (1 / math.pi))
    return (t - k * PI_HI) - k * PI_LO


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    """Evaluate a polynomial by Horner's method. The constant term comes first."""
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def sin_squared(t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute sin(t)**2 with an error up to 3e-7 for float32 |t| up to 1000.

    Range reduction and a polynomial vectorize and fuse with neighboring operations. XLA's `sin` does not.
    """
    square = jnp.square(_reduced(t))
    return _polynomial(square, _SIN_SQUARED) * square


def sin_twice(t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute sin(2 * t), the derivative of sin(t)**2, with an error up to 1e-6 for float32 |t| up to 1000."""
    r = _reduced(t)
    return _polynomial(jnp.square(r), _SIN_TWICE) * r


@jax.custom_jvp
@jax.named_scope("snake")
def snake(
    x: Float[Array, "batch time channels"], alpha: Float[Array, "1 1 channels"]
) -> Float[Array, "batch time channels"]:
    """Compute x + sin(alpha * x)**2 / alpha (https://arxiv.org/abs/2006.08195), always in float32."""
    x32, alpha32 = x.astype(jnp.float32), alpha.astype(jnp.float32)
    return (x32 + sin_squared(alpha32 * x32) / (alpha32 + 1e-9)).astype(x.dtype)


@snake.defjvp
@jax.named_scope("snake")
def _snake_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # Autodiff would keep more intermediate results, and sum twice over time for alpha.
    x, alpha = (primal.astype(jnp.float32) for primal in primals)
    dx, dalpha = (tangent.astype(jnp.float32) for tangent in tangents)
    inverse = 1 / (alpha + 1e-9)
    slope = sin_twice(alpha * x) * inverse
    dy = dx * (1 + alpha * slope) + dalpha * (x * slope - sin_squared(alpha * x) * (inverse * inverse))
    return snake(*primals), dy.astype(primals[0].dtype)


def _shifted(x: Array, taps: int, dilation: int) -> list[Array]:
    """Return the zero-padded x, shifted by (i - taps // 2) * dilation steps for each tap i of a convolution."""
    time = x.shape[1]
    reach = (taps - 1) * dilation // 2
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    return [padded[:, i * dilation : i * dilation + time] for i in range(taps)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
@jax.named_scope("depthwise_conv")
def depthwise_conv(
    x: Float[Array, "batch time channels"], kernel: Float[Array, "taps 1 channels"], dilation: int = 1
) -> Float[Array, "batch time channels"]:
    """Apply a depthwise convolution that keeps the length. The number of taps is odd.

    Has no forward-mode derivative (`jax.jvp`).
    """
    shifted = _shifted(x, len(kernel), dilation)
    return functools.reduce(jnp.add, [y * tap for y, tap in zip(shifted, kernel[:, None], strict=True)])


def _depthwise_conv_fwd(x: Array, kernel: Array, dilation: int) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_conv(x, kernel, dilation), (x, kernel)


@jax.named_scope("depthwise_conv")
def _depthwise_conv_bwd(dilation: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    # Autodiff would pad, add and reduce an array for each tap. Here all taps share one pass over memory, which makes a
    # training step on a CPU 1.3 times as fast.
    x, kernel = residuals
    products = [(dy * y).astype(jnp.float32) for y in _shifted(x, len(kernel), dilation)]
    zeros = [jnp.zeros(())] * len(kernel)
    sums = lax.reduce(products, zeros, lambda a, b: [i + j for i, j in zip(a, b, strict=True)], (1,))
    return depthwise_conv(dy, kernel[::-1], dilation), jnp.stack(sums).sum(1, keepdims=True).astype(kernel.dtype)


depthwise_conv.defvjp(_depthwise_conv_fwd, _depthwise_conv_bwd)


@jax.named_scope("conv")
def conv(
    x: Float[Array, "batch time in_channels"], kernel: Float[Array, "taps in_channels out_channels"], dilation: int = 1
) -> Float[Array, "batch time out_channels"]:
    """Apply a convolution that keeps the length, as one matrix product. The number of taps is odd.

    The side with fewer channels is shifted: the input before the product or the output after it.
    """
    taps, in_channels, out_channels = kernel.shape
    if taps == 1:
        return x @ kernel[0]
    if in_channels <= out_channels:
        columns = jnp.concatenate(_shifted(x, taps, dilation), axis=-1)
        return columns @ kernel.reshape(taps * in_channels, out_channels)
    products = x @ kernel.swapaxes(0, 1).reshape(in_channels, taps * out_channels)
    shifted = _shifted(products, taps, dilation)
    return functools.reduce(jnp.add, [y[..., i * out_channels : (i + 1) * out_channels] for i, y in enumerate(shifted)])


# Winograd's algorithm pays on a CPU from this number of frames on. It saves arithmetic, but reads the kernel more
# often. On two cores, encoding 10 s is 10 % faster, but 1 s would take a third longer. 200 and 1000 do as well as 512.
WINOGRAD_MIN_FRAMES = 512


def _winograd_pays(x: Array, frames: int) -> bool:
    # In bfloat16 the differences of Winograd's algorithm would lose precision.
    return len(x) * frames >= WINOGRAD_MIN_FRAMES and x.dtype == jnp.float32


def two_taps(
    x: Float[Array, "batch _ in_channels"], kernel: Float[Array, "2 in_channels out_channels"], *, flipped: bool = False
) -> Float[Array, "batch frames out_channels"]:
    """Apply a convolution of two taps: x[i] @ kernel[0] + x[i + 1] @ kernel[1].

    With `flipped`, the taps are swapped: x[i] @ kernel[1] + x[i + 1] @ kernel[0]. An even number of frames is faster.
    """
    batch, frames, (_, in_channels, out_channels) = len(x), x.shape[1] - 1, kernel.shape

    def one_product(x: Array, kernel: Array) -> Array:
        neighbors = [x[:, :-1], x[:, 1:]]
        joined = jnp.concatenate(neighbors[::-1] if flipped else neighbors, axis=-1)
        return joined @ kernel.reshape(2 * in_channels, out_channels)  # a view, not a copy

    def winograd(x: Array, kernel: Array) -> Array:
        # Minimal filtering F(2, 2) (https://arxiv.org/abs/1509.09308): two outputs from three products. The middle
        # frame is multiplied by the sum of the taps, the differences to its two neighbors by one tap each.
        this, following = (kernel[1], kernel[0]) if flipped else kernel
        first, middle, last = x[:, :-1:2], x[:, 1::2], x[:, 2::2]
        both = middle @ (this + following)
        y = jnp.stack([both + (first - middle) @ this, both + (last - middle) @ following], axis=2)
        return y.reshape(batch, frames, out_channels)

    if frames % 2 or not _winograd_pays(x, frames):
        return one_product(x, kernel)
    # For a TPU XLA estimates 5 % fewer cycles for `winograd`, but compiling takes a third longer.
    return lax.platform_dependent(x, kernel, cpu=winograd, default=one_product)


@jax.named_scope("strided_conv")
def strided_conv(
    x: Float[Array, "batch time in_channels"], kernel: Float[Array, "taps in_channels out_channels"]
) -> Float[Array, "batch frames out_channels"]:
    """Apply a convolution with kernel size 2 * stride and padding ceil(stride / 2), on blocks of `stride` steps."""
    stride = len(kernel) // 2
    batch, time, in_channels = x.shape
    frames = strided_length(time, stride)
    even_frames = frames + (frames % 2 if _winograd_pays(x, frames) else 0)
    left = math.ceil(stride / 2)
    right = (even_frames + 1) * stride - left - time  # negative if no frame uses the last steps
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (left, right, 0), (0, 0, 0)))
    blocks = padded.reshape(batch, even_frames + 1, stride * in_channels)
    return two_taps(blocks, kernel.reshape(2, stride * in_channels, -1))[:, :frames]


@jax.named_scope("transposed_conv")
def transposed_conv(
    x: Float[Array, "batch frames in_channels"], kernel: Float[Array, "2 in_channels stride out_channels"]
) -> Float[Array, "batch time out_channels"]:
    """Apply a transposed convolution with kernel size 2 * stride and padding ceil(stride / 2).

    The output has `frames * stride` steps. Each frame gives two blocks of `stride` steps, and its second block is added
    to the first block of the next frame. The kernel is stored as these two halves, so the products do not need a
    transposed copy.
    """
    _, in_channels, stride, out_channels = kernel.shape
    batch, frames, _ = x.shape
    halves = kernel.reshape(2, in_channels, stride * out_channels)
    odd = (frames + 1) % 2 if _winograd_pays(x, frames + 1) else 0
    blocks = two_taps(jnp.pad(x, ((0, 0), (1, 1 + odd), (0, 0))), halves, flipped=True)
    samples = blocks.reshape(batch, -1, out_channels)
    left = math.ceil(stride / 2)
    return samples[:, left : left + frames * stride]
