"""Validation of inputs. Each mistake raises one `ValueError` with a fix.

Shapes and dtypes are always checked. Values are checked only outside of `jit`, because a traced array has none.

`checked_audio`, `checked_latents` and `checked_codes` are context managers around the model's computation. The check of
values on a device is dispatched before the computation and read after it, so that the host waits only once.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .config import SNACConfig


@contextlib.contextmanager
def checked_audio(audio: Any) -> Iterator[None]:
    """Check that `audio` is a (batch, 1, samples) array of finite floats."""
    _check_floats("`audio`", audio, "Scale samples to floats between -1 and 1 (int16: `audio / 32768`)")
    fixes = {
        1: " For one clip pass `audio[None, None]`.",
        2: " For one clip of shape (1, samples) pass `audio[None]`, for a batch of mono clips `audio[:, None]`.",
    }
    if audio.ndim != 3:
        raise ValueError(f"`audio` must be (batch, 1, samples), got {audio.shape}.{fixes.get(audio.ndim, '')}")
    if audio.shape[1] != 1:
        raise ValueError(
            f"`audio` must be mono, (batch, 1, samples), got {audio.shape}. Mix the channels with "
            "`audio.mean(1, keepdims=True)` or move them to the batch with `audio.reshape(-1, 1, audio.shape[-1])`."
        )
    if audio.shape[2] == 0:
        raise ValueError(f"`audio` must have at least one sample, got {audio.shape}.")
    with _checked_finite("`audio`", audio):
        yield


@contextlib.contextmanager
def checked_latents(latents: Any, config: SNACConfig) -> Iterator[None]:
    """Check that `latents` is a (batch, frames, latent_dim) array of finite floats."""
    _check_floats("`latents`", latents, "Pass the latents of `audio_to_latents`, `quantize` or `dequantize`")
    if latents.ndim != 3 or latents.shape[2] != config.latent_dim or latents.shape[1] == 0:
        raise ValueError(f"`latents` must be (batch, frames, {config.latent_dim}), got {latents.shape}.")
    with _checked_finite("`latents`", latents):
        yield


@contextlib.contextmanager
def checked_codes(codes: Any, config: SNACConfig) -> Iterator[None]:
    """Check that `codes` has one (batch, frames / stride) integer array per level, with values in the codebook."""
    strides, size = config.vq_strides, config.codebook_size
    if not isinstance(codes, Sequence) or len(codes) != len(strides):
        got = f"{len(codes)} items" if isinstance(codes, Sequence) else type(codes).__name__
        raise ValueError(f"`codes` must be a tuple or list of {len(strides)} arrays, coarse to fine, got {got}.")
    for i, level in enumerate(codes):
        if not isinstance(level, jax.Array | np.ndarray) or not jnp.issubdtype(level.dtype, jnp.integer):
            raise ValueError(f"`codes[{i}]` must be an array of integers, got {getattr(level, 'dtype', type(level))}.")
        if level.ndim != 2:
            raise ValueError(f"`codes[{i}]` must be (batch, frames), got {level.shape}.")
    shapes = [level.shape for level in codes]
    frames = [shape[1] * stride for shape, stride in zip(shapes, strides, strict=True)]
    if len(set(frames)) > 1 or len({shape[0] for shape in shapes}) > 1 or frames[0] == 0:
        finest = max(frames)
        raise ValueError(
            f"`codes` must cover the same clips and time at every level. With strides {strides}, codes for {finest} "
            f"latent frames have (batch, frames) {[(shapes[0][0], finest // s) for s in strides]}, got {shapes}."
        )
    concrete = {i: level for i, level in enumerate(codes) if not isinstance(level, jax.core.Tracer)}
    on_host = [level for level in concrete.values() if isinstance(level, np.ndarray)]
    on_device = [level for level in concrete.values() if isinstance(level, jax.Array)]
    valid = [_in_codebook(level, size) for level in on_host]
    if on_device:
        valid.append(_all_in_codebook(on_device, size))
    yield
    if not all(valid):
        i, level = next((i, level) for i, level in concrete.items() if not _in_codebook(level, size))
        raise ValueError(
            f"`codes[{i}]` must be between 0 and `codebook_size` - 1 (={size - 1}), "
            f"got values from {level.min()} to {level.max()}."
        )


def check_clip(clip: Any, i: int) -> np.ndarray:
    """Check that clip `i` is a (samples,) array of finite floats. Return it on the host."""
    name = f"`clips[{i}]`"
    _check_floats(name, clip, "Scale samples to floats between -1 and 1 (int16: `clip / 32768`)")
    if clip.ndim != 1 or len(clip) == 0:
        raise ValueError(f"{name} must be mono audio of at least one sample, (samples,), got {clip.shape}.")
    clip = np.asarray(clip)
    for start in range(0, len(clip), 2**20):  # in pieces: a clip may be hours long and memory-mapped
        piece = clip[start : start + 2**20]
        if not _finite(piece):
            raise _not_finite(name, piece)
    return clip


def check_clip_codes(codes: Any, samples: Any, i: int, config: SNACConfig) -> tuple[list[np.ndarray], int | None]:
    """Check the codes of clip `i`, one (frames / stride,) array per level, and its length. Return both, on the host."""
    if not isinstance(codes, Sequence) or not all(isinstance(x, jax.Array | np.ndarray) and x.ndim == 1 for x in codes):
        raise ValueError(
            f"`clips[{i}]` must be one array (frames,) for each level, got {jax.tree.map(np.shape, codes)}."
        )
    levels = [np.asarray(level) for level in codes]
    try:
        with checked_codes([level[None] for level in levels], config):
            pass
    except ValueError as error:
        raise ValueError(f"`clips[{i}]` cannot be decoded: {error}") from None
    decoded, window = len(levels[0]) * config.vq_strides[0] * config.hop_length, config.attn_window_size or 1
    if decoded % config.pad_multiple:
        raise ValueError(
            f"`clips[{i}]` has {decoded // config.hop_length} latent frames, which must be a multiple of the attention "
            f"window, {window}."
        )
    if samples is not None and not 0 < samples <= decoded:
        raise ValueError(
            f"`samples` of `clips[{i}]` (={samples}) must be between 1 and {decoded}, the number of decoded samples."
        )
    return levels, samples


def check_padding_mask(padding_mask: Any, config: SNACConfig, batch: int, frames: int) -> None:
    """Check that `padding_mask` is None, or (batch, frames) booleans for a model that supports masks."""
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
        raise ValueError(f"`padding_mask` must be ({batch}, {frames}) booleans, one per latent frame, got {got}.")
    check_cuttable(config)


def check_cuttable(config: SNACConfig) -> None:
    """Check that the model can process a clip in parts: masked, packed, tiled or streamed."""
    if 1 in config.encoder_rates:
        raise ValueError(
            f"`encoder_rates` (={config.encoder_rates}) has a rate of 1, whose convolution adds a frame. "
            "Such a model supports only `encode` and `decode` of whole clips, without a `padding_mask`."
        )


def _check_floats(name: str, array: Any, fix: str) -> None:
    if not isinstance(array, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be a JAX or NumPy array, got {type(array).__module__}.{type(array).__name__}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {array.dtype}. {fix}.")


@contextlib.contextmanager
def _checked_finite(name: str, array: Any) -> Iterator[None]:
    finite = _finite(array)
    yield
    if not finite:
        raise _not_finite(name, array)


def _finite(array: Any) -> Any:
    if isinstance(array, jax.core.Tracer):
        return True
    return np.isfinite(_float32(array)).all() if isinstance(array, np.ndarray) else _all_finite(array)


def _not_finite(name: str, array: Any) -> ValueError:
    places = ~np.isfinite(_float32(array))
    return ValueError(f"{name} must be finite, got NaN or infinity in {places.sum()} of {array.size} places.")


def _float32(array: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity
        return np.asarray(array, np.float32)


def _in_codebook(level: Any, size: int) -> Any:
    return ((level >= 0) & (level < size)).all()


# One program and one transfer for all levels: on a GPU each operation and each transfer takes 0.1 ms.
_all_in_codebook = jax.jit(
    lambda levels, size: jnp.stack([_in_codebook(x, size) for x in levels]).all(), static_argnums=1
)
_all_finite = jax.jit(lambda array: jnp.isfinite(array).all())
