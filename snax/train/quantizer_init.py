"""Initialization of the quantizer from audio, for training from scratch."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from ..codec.model import SNAC


def fit_quantizer(model: SNAC, audio: Float[jax.Array, "batch 1 samples"]) -> SNAC:
    """Fit the quantizer of a randomly initialized model to the latents of `audio`. Returns a changed copy.

    With torch's initialization, a level's projections into the codebook's dimensions and back are independent: the
    level's output is unrelated to its input, and each level increases the residual. Training does not correct that
    soon (benchmarks/README.md has figures). Here the encoder's output is scaled to mean 0 and variance 1. Each level
    projects the residual on its principal components, whitened like the codebook's rows, and back the same way.
    (SoundStream, Zeghidour et al., 2021, arXiv:2107.03312, initializes codebooks from data; this does the same for the
    projections.)
    """
    model = jax.tree.map(lambda parameter: parameter, model)  # a copy, to be changed
    latents = model.audio_to_latents(audio)
    mean, deviation = latents.mean((0, 1), keepdims=True), latents.std((0, 1)).mean()
    last = model.encoder.conv_out
    _set(last.kernel, last.kernel[...] / deviation)
    assert last.bias is not None
    _set(last.bias, (last.bias[...] - mean[0, 0]) / deviation)

    latents = (latents - mean) / deviation
    for i, level in enumerate(model.quantizer.quantizers):
        residual = latents - model.quantizer(latents, num_levels=i).z_q
        pooled = residual.reshape(-1, level.stride, residual.shape[-1]).mean(axis=1)
        center = pooled.mean(axis=0, keepdims=True)
        variances, directions = jnp.linalg.eigh((pooled - center).T @ (pooled - center) / len(pooled))
        dim = level.codebook.shape[1]
        # The floor keeps components of almost no variance from amplifying rounding errors.
        scales = jnp.sqrt(jnp.maximum(variances[-dim:], 1e-4 * variances[-1]))[None]
        directions = directions[:, -dim:]
        _set(level.in_proj.kernel, (directions / scales)[None])
        _set(level.in_proj.bias, -(center @ (directions / scales))[0])
        _set(level.out_proj.kernel, (directions * scales).T[None])
        _set(level.out_proj.bias, center[0])
    return model


def _set(parameter: nnx.Param[jax.Array] | None, value: jax.Array) -> None:
    assert parameter is not None
    assert parameter.shape == value.shape
    parameter.set_value(value)
