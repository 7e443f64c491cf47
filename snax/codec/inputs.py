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
    concrete = {i: level for i, level in enumerate(codes) if not isinstance(level, jax.core.Tracer)}
    on_host = [level for level in concrete.values() if isinstance(level, np.ndarray)]
    on_device = [level for level in concrete.values() if isinstance(level, jax.Array)]
    valid = all(_in_codebook(level, size) for level in on_host)
    if not valid or (on_device and not _all_in_codebook(on_device, size)):
        i, level = next((i, level) for i, level in concrete.items() if not _in_codebook(level, size))
        raise ValueError(
            f"codes[{i}] must be between 0 and `codebook_size` - 1 (={size - 1}), "
            f"got values from {level.min()} to {level.max()}."
        )


def check_clip(clip: Any, i: int) -> np.ndarray:
    """Clip number `i` of several, an array of finite floats (samples,), on the host. Raises ValueError otherwise."""
    name = f"clips[{i}]"
    _check_floats(name, clip, "scale samples to floats between -1 and 1 (int16: `clip / 32768`)")
    if clip.ndim != 1 or len(clip) == 0:
        raise ValueError(f"{name} must be mono audio of at least one sample, (samples,), got {clip.shape}.")
    clip = np.asarray(clip)
    for start in range(0, len(clip), 2**20):  # in pieces: it may be hours long, and mapped from a file
        _check_finite(name, clip[start : start + 2**20])
    return clip


def check_clip_codes(codes: Any, samples: Any, i: int, config: SNACConfig) -> tuple[list[np.ndarray], int | None]:
    """Clip number `i` of several: its codes, (frames / stride,) a level, on the host. Raises ValueError otherwise."""
    if not isinstance(codes, Sequence) or not all(isinstance(x, jax.Array | np.ndarray) and x.ndim == 1 for x in codes):
        raise ValueError(f"clips[{i}] must be one array (frames,) for each level, got {jax.tree.map(np.shape, codes)}.")
    levels = [np.asarray(level) for level in codes]
    try:
        check_codes([level[None] for level in levels], config)
    except ValueError as error:
        raise ValueError(f"clips[{i}] can't be decoded: {error}") from None
    decoded, window = len(levels[0]) * config.vq_strides[0] * config.hop_length, config.attn_window_size or 1
    if decoded % config.pad_multiple:
        raise ValueError(
            f"clips[{i}] has {decoded // config.hop_length} latent frames, but attention works on windows of {window}: "
            "codes for all of the last one are needed."
        )
    if samples is not None and not 0 < samples <= decoded:
        raise ValueError(f"clips[{i}] has codes for {decoded} samples, so `samples` can't be {samples}.")
    return levels, samples


def check_padding_mask(padding_mask: Any, config: SNACConfig, batch: int, frames: int) -> None:
    """Raises ValueError unless `padding_mask` is None, or (batch, frames) booleans for a codec that can be cut."""
    if padding_mask is None:
        return
    if (
        not isinstance(padding_mask, jax.Array | np.ndarray)
        or padding_mask.dtype != bool
        or padding_mask.shape != (batch, frames)
    ):
        got = (
            f"{padding_mask.dtype} {padding_mask.shape}"
            if hasattr(padding_mask, "shape")
            else type(padding_mask).__name__
        )
        raise ValueError(f"padding_mask must be booleans, one a latent frame, ({batch}, {frames}), got {got}.")
    check_cuttable(config)


def check_cuttable(config: SNACConfig) -> None:
    """Raises ValueError if clips can't share a row or be cut: if a part has other frames than the whole has there."""
    if 1 in config.encoder_rates:
        raise ValueError(
            f"`encoder_rates` (={config.encoder_rates}) has a rate of 1, whose convolution adds a frame: "
            "such a codec takes whole clips of one length only, with `encode` and `decode`."
        )


def _check_floats(name: str, array: Any, mend: str) -> None:
    if not isinstance(array, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be a JAX or NumPy array, got {type(array).__module__}.{type(array).__name__}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {array.dtype}: {mend}.")


def _check_finite(name: str, array: Any) -> None:
    if isinstance(array, jax.core.Tracer):
        return
    on_host = isinstance(array, np.ndarray)
    with np.errstate(over="ignore"):  # a float64 too large for a float32 is reported as the infinity it becomes
        if np.isfinite(array.astype(np.float32)).all() if on_host else _all_finite(array):
            return
        finite = np.isfinite(np.asarray(array, np.float32))
    raise ValueError(f"{name} must be finite, got NaN or infinity in {(~finite).sum()} of {array.size} places.")


def _in_codebook(level: Any, size: int) -> Any:
    return ((level >= 0) & (level < size)).all()


# As one program, for whose result the host waits once: on a GPU each operation and each wait takes 0.1 ms.
_all_in_codebook = jax.jit(
    lambda levels, size: jnp.stack([_in_codebook(x, size) for x in levels]).all(), static_argnums=1
)
_all_finite = jax.jit(lambda array: jnp.isfinite(array).all())
