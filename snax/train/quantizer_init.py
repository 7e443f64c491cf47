"""Where training from scratch begins: a drawn codec whose quantizer fits its latents."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from ..codec.model import SNAC


def fit_quantizer(model: SNAC, audio: Float[jax.Array, "batch 1 samples"]) -> SNAC:
    """`model`, with drawn weights, changed so that each level of its quantizer describes what it sees of `audio`.

    As torch draws them, a level's projections into the codebook's dimensions and back have nothing to do with each
    other: what it adds is not what it saw, and every level leaves more than it found. Training does not mend that soon
    (benchmarks/README.md has figures). Here latents get mean 0 and variance 1, a level projects on the principal
    directions of what is left of them, whitened, as its rows are, and back the same way. (Codebooks are often begun
    from data, as in SoundStream, Zeghidour et al., 2021, arXiv:2107.03312; this does the same for what surrounds them.)
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
        # What hardly varies would become rounding, made large.
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
