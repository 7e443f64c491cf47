"""Multi-scale residual vector quantization: coarse levels see the latents averaged over longer stretches."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jaxtyping import Float, Int32, Integer

from .config import SNACConfig
from .layers import Conv, Rngs, parameter


def _normalize(x: Float[Array, "*shape dim"]) -> Float[Array, "*shape dim"]:
    """Unit length along the last axis, as torch's `normalize`: shorter than 1e-12 is left short."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Quantized(NamedTuple):
    """A quantizer's results; those of several levels have a tuple of `codes` and of `z_e`."""

    z_q: Float[Array, "batch frames channels"]
    """The latents that the codes stand for. The gradient passes straight through."""
    codes: Any
    """(batch, level_frames) int32."""
    z_e: Any
    """(batch, level_frames, codebook_dim): the projected latents that were looked up, not normalised."""


class VectorQuantize(nnx.Module):
    """One level: average over `stride` frames, project, nearest codebook row by angle, project back, repeat."""

    def __init__(self, channels: int, codebook_size: int, codebook_dim: int, stride: int, *, rngs: Rngs):
        self.stride = stride
        self.in_proj = Conv(channels, codebook_dim, 1, rngs=rngs)
        self.out_proj = Conv(codebook_dim, channels, 1, rngs=rngs)
        shape = (codebook_size, codebook_dim)
        self.codebook = parameter(rngs, shape, lambda rngs: jax.random.normal(rngs.params(), shape))

    def __call__(self, z: Float[Array, "batch frames channels"]) -> Quantized:
        batch, frames, channels = z.shape
        pooled = z.reshape(batch, frames // self.stride, self.stride, channels).mean(axis=2)
        z_e = self.in_proj(pooled)
        codes = self.nearest(z_e)
        rows = self.codebook[...][codes]
        # Straight through: the gradient passes as if the codebook were not there. The sum rounds as the reference does.
        straight_through = z_e + lax.stop_gradient(rows - z_e)
        return Quantized(self._project_back(straight_through), codes, z_e)

    def nearest(self, projected: Float[Array, "batch frames dim"]) -> Int32[Array, "batch frames"]:
        """The codebook row nearest to each vector once both are normalised; of equals, the lowest index.

        In float32 whatever the model's dtype: 4096 directions are closer to each other than bfloat16 can tell.
        """
        vectors = _normalize(projected.astype(jnp.float32))
        rows = _normalize(self.codebook[...].astype(jnp.float32))
        # Written out as the reference writes it, so that rounding falls the same way between two close rows.
        similarities = jnp.matmul(2 * vectors, rows.T, precision=lax.Precision.HIGHEST)
        distances = jnp.square(vectors).sum(-1, keepdims=True) - similarities + jnp.square(rows).sum(-1)[None, None]
        return jnp.argmin(distances, axis=-1)

    def dequantize(self, codes: Integer[Array, "batch level_frames"]) -> Float[Array, "batch frames channels"]:
        """What `codes` of this level add to the latents."""
        return self._project_back(self.codebook[...][codes])

    def _project_back(self, rows: Float[Array, "batch level_frames dim"]) -> Float[Array, "batch frames channels"]:
        return jnp.repeat(self.out_proj(rows), self.stride, axis=1)


class ResidualVectorQuantize(nnx.Module):
    """The levels, coarse to fine, each quantizing what the ones before it left over."""

    def __init__(self, config: SNACConfig, *, rngs: Rngs):
        self.quantizers = nnx.List(
            VectorQuantize(config.latent_dim, config.codebook_size, config.codebook_dim, stride, rngs=rngs)
            for stride in config.vq_strides
        )

    @jax.named_scope("quantizer")
    def __call__(self, latents: Float[Array, "batch frames channels"], num_levels: int | None = None) -> Quantized:
        """Quantize with the first `num_levels` levels, by default all."""
        z_q, residual, codes, z_e = jnp.zeros_like(latents), latents, [], []
        for quantizer in self.quantizers[:num_levels]:
            level = quantizer(residual)
            z_q, residual = z_q + level.z_q, residual - level.z_q
            codes.append(level.codes)
            z_e.append(level.z_e)
        return Quantized(z_q, tuple(codes), tuple(z_e))

    @jax.named_scope("quantizer")
    def dequantize(self, codes: Sequence[Integer[Array, "batch _"]]) -> Float[Array, "batch frames channels"]:
        """The sum of what all levels' codes stand for."""
        levels = [quantizer.dequantize(level) for quantizer, level in zip(self.quantizers, codes, strict=True)]
        return functools.reduce(jnp.add, levels)
