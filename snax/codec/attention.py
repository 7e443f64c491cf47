"""Windowed self-attention, used around the bottleneck of the 32 and 44 kHz models."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jaxtyping import Float

from .config import HEAD_DIM
from .layers import Context, Layer, Rngs, constant, uniform


def rotary_frequencies() -> np.ndarray:
    """Return the RoPE frequencies (https://arxiv.org/abs/2104.09864) in radians per frame, with theta 10000."""
    return (10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)


def _rotate(x: Float[Array, "batch heads windows frames dim"]) -> Float[Array, "batch heads windows frames dim"]:
    """Apply RoPE: rotate each pair (i, i + dim / 2) by its frequency times the frame's position in the window."""
    angles = jnp.arange(x.shape[-2], dtype=jnp.float32)[:, None] * rotary_frequencies()[None]
    cos, sin = (f(angles)[None, None, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class LayerNorm(nnx.Module):
    """torch's `LayerNorm` over the channels, always computed in float32."""

    def __init__(self, channels: int, *, rngs: Rngs):
        self.scale = constant(rngs, (channels,), 1.0)
        self.bias = constant(rngs, (channels,), 0.0)

    def __call__(self, x: Float[Array, "batch frames channels"]) -> Float[Array, "batch frames channels"]:
        x32 = x.astype(jnp.float32)
        centered = x32 - x32.mean(axis=-1, keepdims=True)
        variance = jnp.square(centered).mean(axis=-1, keepdims=True)
        scale, bias = (p[...].astype(jnp.float32)[None, None] for p in (self.scale, self.bias))
        return (centered * (lax.rsqrt(variance + 1e-5) * scale) + bias).astype(x.dtype)


class Linear(nnx.Module):
    """Linear layer without bias."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: Rngs):
        self.kernel = uniform(rngs, (in_channels, out_channels), fan_in=in_channels)

    def __call__(self, x: Float[Array, "batch frames in_channels"]) -> Float[Array, "batch frames out_channels"]:
        return x @ self.kernel[...]


class LocalMHA(Layer):
    """Residual pre-norm multi-head self-attention in non-overlapping windows."""

    def __init__(self, channels: int, window_size: int, *, rngs: Rngs):
        self.window_size = window_size
        self.norm = LayerNorm(channels, rngs=rngs)
        self.to_qkv = Linear(channels, 3 * channels, rngs=rngs)
        self.to_out = Linear(channels, channels, rngs=rngs)

    @property
    def block_size(self) -> int:
        return self.window_size

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "batch frames channels"], context: Context = Context()
    ) -> Float[Array, "batch frames channels"]:
        batch, frames, channels = x.shape
        # As in the reference: `frames // window_size` equal windows. 40 frames are one window of 40, not 32 + 8.
        windows = frames // self.window_size
        if windows == 0 or frames % windows:
            raise ValueError(
                f"Cannot divide {frames} latent frames into equal windows of at least `attn_window_size` "
                f"(={self.window_size}) frames. Pass a multiple of {self.window_size} frames."
            )
        qkv = self.to_qkv(self.norm(x))
        qkv = qkv.reshape(batch, windows, frames // windows, 3, channels // HEAD_DIM, HEAD_DIM)
        query, key, value = qkv.transpose(3, 0, 4, 1, 2, 5)
        scores = _rotate(query) @ _rotate(key).swapaxes(-1, -2) / HEAD_DIM**0.5
        heads = jax.nn.softmax(scores, axis=-1) @ value
        merged = heads.transpose(0, 2, 3, 1, 4).reshape(batch, frames, channels)
        return x + self.to_out(merged)
