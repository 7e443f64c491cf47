"""Data-dependent initialization of the quantizer, for training from scratch."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from ..codec.model import SNAC


def fit_quantizer(model: SNAC, audio: Float[jax.Array, "batch 1 samples"]) -> SNAC:
    """Fit the quantizer of a randomly initialized model to the latents of `audio`. Return a modified copy.

    In torch's initialization, the two projections of a level, into the codebook's dimensions and back, are independent.
    The output of a level is unrelated to its input, so each level increases the residual. Training takes long to
    correct that (benchmarks/README.md has figures).

    Here the output of the encoder is normalized to mean 0 and variance 1. Each level projects the residual onto its
    principal components, whitened to match the random codebook, and projects back with the pseudo-inverse. SoundStream
    (Zeghidour et al., 2021, arXiv:2107.03312) initializes codebooks from data. This does the same for the projections.
    """
    model = jax.tree.map(lambda parameter: parameter, model)  # a copy, which is modified below
    latents = model.audio_to_latents(audio)
    mean, std = latents.mean((0, 1), keepdims=True), latents.std((0, 1)).mean()
    conv_out = model.encoder.conv_out
    _set(conv_out.kernel, conv_out.kernel[...] / std)
    assert conv_out.bias is not None
    _set(conv_out.bias, (conv_out.bias[...] - mean[0, 0]) / std)

    latents = (latents - mean) / std
    for i, level in enumerate(model.quantizer.quantizers):
        residual = latents - model.quantizer(latents, num_levels=i).z_q
        pooled = residual.reshape(-1, level.stride, residual.shape[-1]).mean(axis=1)
        center = pooled.mean(axis=0, keepdims=True)
        variances, directions = jnp.linalg.eigh((pooled - center).T @ (pooled - center) / len(pooled))
        dim = level.codebook.shape[1]
        # Without the floor, components of almost no variance amplify rounding errors.
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
