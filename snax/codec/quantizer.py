"""Multi-scale residual vector quantization: coarse levels quantize latents averaged over several frames."""

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
    """Scale the last axis to unit length. Like torch's `normalize`, divide by at least 1e-12."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Quantized(NamedTuple):
    """The results of a quantizer. For several levels, `codes` and `z_e` are tuples with one array per level."""

    z_q: Float[Array, "batch frames channels"]
    """The quantized latents, with a straight-through gradient."""
    codes: Any
    """(batch, level_frames) int32."""
    z_e: Any
    """(batch, level_frames, codebook_dim): the projected latents before the lookup, not normalized."""


class VectorQuantize(nnx.Module):
    """One level: average over `stride` frames, project, look up the nearest codebook vector, project back, repeat."""

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
        # The gradient skips the codebook. The sum is written as in the reference, to round the same way.
        straight_through = z_e + lax.stop_gradient(rows - z_e)
        return Quantized(self._project_back(straight_through), codes, z_e)

    def nearest(self, projected: Float[Array, "batch frames dim"]) -> Int32[Array, "batch frames"]:
        """Return the index of the nearest codebook vector by angle. The lowest index wins a tie.

        Always in float32: bfloat16 cannot separate 4096 directions.
        """
        vectors = _normalize(projected.astype(jnp.float32))
        rows = _normalize(self.codebook[...].astype(jnp.float32))
        # Written as in the reference, so that rounding decides the same way between two close vectors.
        similarities = jnp.matmul(2 * vectors, rows.T, precision=lax.Precision.HIGHEST)
        distances = jnp.square(vectors).sum(-1, keepdims=True) - similarities + jnp.square(rows).sum(-1)[None, None]
        return jnp.argmin(distances, axis=-1)

    def dequantize(self, codes: Integer[Array, "batch level_frames"]) -> Float[Array, "batch frames channels"]:
        """Return the contribution of this level's codes to the latents."""
        return self._project_back(self.codebook[...][codes])

    def _project_back(self, rows: Float[Array, "batch level_frames dim"]) -> Float[Array, "batch frames channels"]:
        return jnp.repeat(self.out_proj(rows), self.stride, axis=1)


class ResidualVectorQuantize(nnx.Module):
    """All levels, coarse to fine. Each level quantizes the residual of the levels before it."""

    def __init__(self, config: SNACConfig, *, rngs: Rngs):
        self.quantizers = nnx.List(
            VectorQuantize(config.latent_dim, config.codebook_size, config.codebook_dim, stride, rngs=rngs)
            for stride in config.vq_strides
        )

    @jax.named_scope("quantizer")
    def __call__(self, latents: Float[Array, "batch frames channels"], num_levels: int | None = None) -> Quantized:
        """Quantize `latents` with the first `num_levels` levels. Default: all levels."""
        z_q, residual, codes, z_e = jnp.zeros_like(latents), latents, [], []
        for quantizer in self.quantizers[:num_levels]:
            level = quantizer(residual)
            z_q, residual = z_q + level.z_q, residual - level.z_q
            codes.append(level.codes)
            z_e.append(level.z_e)
        return Quantized(z_q, tuple(codes), tuple(z_e))

    @jax.named_scope("quantizer")
    def dequantize(self, codes: Sequence[Integer[Array, "batch _"]]) -> Float[Array, "batch frames channels"]:
        """Return the latents of `codes`, the sum over all levels."""
        levels = [quantizer.dequantize(level) for quantizer, level in zip(self.quantizers, codes, strict=True)]
        return functools.reduce(jnp.add, levels)
