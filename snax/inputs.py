"""What a caller may pass in, checked: each mistake gets one `ValueError` that says how to mend it.

Shapes and dtypes are checked always, values only outside of `jit`: a traced array has none yet.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .config import SNACConfig


def check_audio(audio: Any) -> None:
    """Raises ValueError unless `audio` is a (batch, 1, samples) array of finite floats."""
    _check_floats("audio", audio, "scale samples to floats between -1 and 1 (int16: `audio / 32768`)")
    mend = {
        1: "for one clip pass `audio[None, None]`",
        2: "for one clip of shape (1, samples) pass `audio[None]`, for a batch of mono clips `audio[:, None]`",
    }
    if audio.ndim != 3:
        raise ValueError(
            f"audio must be (batch, 1, samples), got {audio.shape}"
            + (f": {mend[audio.ndim]}." if audio.ndim in mend else ".")
        )
    if audio.shape[1] != 1:
        raise ValueError(
            f"audio must be mono, (batch, 1, samples), got {audio.shape}: mix the channels, "
            "`audio.mean(1, keepdims=True)`, or make them a batch, `audio.reshape(-1, 1, audio.shape[-1])`."
        )
    if audio.shape[2] == 0:
        raise ValueError(f"audio must have at least one sample, got {audio.shape}.")
    _check_finite("audio", audio)


def check_latents(latents: Any, config: SNACConfig) -> None:
    """Raises ValueError unless `latents` is a (batch, frames, latent_dim) array of finite floats."""
    _check_floats("latents", latents, "latents are what `audio_to_latents`, `quantize` and `dequantize` return")
    if latents.ndim != 3 or latents.shape[2] != config.latent_dim or latents.shape[1] == 0:
        raise ValueError(f"latents must be (batch, frames, {config.latent_dim}), got {latents.shape}.")
    _check_finite("latents", latents)


def check_codes(codes: Any, config: SNACConfig) -> None:
    """Raises ValueError unless `codes` is one (batch, frames / stride) integer array a level, all in the codebook."""
    strides, size = config.vq_strides, config.codebook_size
    if not isinstance(codes, Sequence) or len(codes) != len(strides):
        got = f"{len(codes)} items" if isinstance(codes, Sequence) else type(codes).__name__
        raise ValueError(f"codes must be a tuple or list of {len(strides)} arrays, coarse to fine, got {got}.")
    for i, level in enumerate(codes):
        if not isinstance(level, jax.Array | np.ndarray) or not jnp.issubdtype(level.dtype, jnp.integer):
            raise ValueError(f"codes[{i}] must be an array of integers, got {getattr(level, 'dtype', type(level))}.")
        if level.ndim != 2:
            raise ValueError(f"codes[{i}] must be (batch, frames), got {level.shape}.")
    shapes = [level.shape for level in codes]
    frames = [shape[1] * stride for shape, stride in zip(shapes, strides, strict=True)]
    if len(set(frames)) > 1 or len({shape[0] for shape in shapes}) > 1 or frames[0] == 0:
        finest = max(frames)
        raise ValueError(
            f"codes must cover the same clips and time at every level: with strides {strides}, codes for {finest} "
            f"latent frames have (batch, frames) {[(shapes[0][0], finest // s) for s in strides]}, got {shapes}."
        )
    for i, level in enumerate(codes):
        if not isinstance(level, jax.core.Tracer) and not ((level >= 0) & (level < size)).all():
            raise ValueError(
                f"codes[{i}] must be between 0 and `codebook_size` - 1 (={size - 1}), "
                f"got values from {level.min()} to {level.max()}."
            )


def _check_floats(name: str, array: Any, mend: str) -> None:
    if not isinstance(array, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be a JAX or NumPy array, got {type(array).__module__}.{type(array).__name__}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {array.dtype}: {mend}.")


def _check_finite(name: str, array: Any) -> None:
    if isinstance(array, jax.core.Tracer):
        return
    if isinstance(array, np.ndarray):
        with np.errstate(over="ignore"):  # a float64 too large for a float32 is reported as the infinity it becomes
            finite: Any = np.isfinite(array.astype(np.float32))
    else:
        finite = jnp.isfinite(array)
    if not finite.all():
        raise ValueError(f"{name} must be finite, got NaN or infinity in {(~finite).sum()} of {array.size} places.")
