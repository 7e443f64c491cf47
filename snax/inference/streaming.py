"""Streaming: each layer caches the end of its input, so that nothing is computed twice.

A layer that depends on future input delays its output, and these delays add up to the latency. The concatenated output
equals that of `SNAC.encode` and `SNAC.decode`. The state is explicit: a pytree that is passed in and returned.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Integer, Key, PRNGKeyArray

from ..codec.compiled import compiled
from ..codec.config import SNACConfig
from ..codec.inputs import check_cuttable, checked_audio, checked_codes
from ..codec.model import SNAC
from .steps import FAR, Step, decode_step, decoder_widths, encode_step, encoder_widths, step_shapes


class StreamState(NamedTuple):
    """The state of a batch of streams that advance together, a pytree. The first axis of each array is the batch."""

    frames: int  # latent frames processed so far
    pending: tuple[np.ndarray, ...]  # input that does not fill a block yet
    caches: tuple[Array, ...]
    key: PRNGKeyArray | Key[Array, " batch"] | None


class StreamDecoder:
    """Decode codes as they arrive. The samples equal those of `SNAC.decode`.

        decoder = snax.StreamDecoder(model)
        state = decoder.init_state()
        for codes in ...:                            # for each level (batch, frames / stride)
            state, audio = decoder.step(state, codes)
        audio = decoder.flush(state)

    Only the first `step` and the first `flush` compile.

    Args:
        model: the codec.
        lookahead: latent frames to wait for before audio is returned. Default: the decoder's receptive field (10 frames
            at 24 kHz), for exact audio. With fewer frames, the end of each step is decoded as if the stream ended
            there. benchmarks/README.md has the resulting error.

    Raises:
        ValueError: if `lookahead` is negative or exceeds the receptive field, or if the model cannot stream.
    """

    def __init__(self, model: SNAC, *, lookahead: int | None = None):
        self._config = model.config
        self._stream = _Stream(model, _decode, decoder_widths(model.config), np.int32)
        self.latency = decoder_latency(model.config, self._stream.delay, lookahead)
        """The delay of the audio behind the codes, in samples."""

    def init_state(self, batch: int = 1, *, key: PRNGKeyArray | Key[Array, " batch"] | None = None) -> StreamState:
        """Return the initial state of `batch` streams. `key` is that of `SNAC.decode`."""
        return self._stream.init_state(batch, key)

    def step(
        self, state: StreamState, codes: Sequence[Integer[Array | np.ndarray, "batch _"]]
    ) -> tuple[StreamState, Float[np.ndarray, "batch 1 samples"]]:
        """Process the next codes.

        Args:
            state: the state of the streams.
            codes: one (batch, frames / stride) integer array per level, for a whole number of coarse frames.

        Returns:
            The new state, and the samples that are final, (batch, 1, samples). With attention, samples are final only
            when their attention window is full.

        Raises:
            ValueError: if `codes` is invalid for `SNAC.decode`, or its batch size differs from that of the state.
        """
        with checked_codes(codes, self._config):
            new, (audio,) = self._stream.step(state, codes, self._lag)
            return new, audio[:, None]

    def flush(self, state: StreamState) -> Float[np.ndarray, "batch 1 samples"]:
        """Return the remaining samples at the end of the streams, (batch, 1, samples).

        Raises:
            ValueError: if the last attention window is not full.
        """
        if state.pending[0].shape[1]:
            frames = state.pending[0].shape[1] * self._config.vq_strides[0]
            raise ValueError(
                f"The stream ends {frames} latent frames into an attention window of {self._config.attn_window_size}. "
                "Pass codes for the whole window before `flush`."
            )
        return self._stream.tail(state, self._lag)[0][:, None]

    @property
    def _lag(self) -> Fraction:
        return Fraction(self.latency, self._config.pad_multiple)


class StreamEncoder:
    """Encode audio as it arrives. The codes equal those of `SNAC.encode`. Used like `StreamDecoder`.

    Args:
        model: the codec.

    Raises:
        ValueError: if the model cannot stream.
    """

    def __init__(self, model: SNAC):
        self._config = model.config
        self._stream = _Stream(model, _encode, encoder_widths(model.config), np.float32)
        self.latency = int(self._stream.delay * model.config.pad_multiple)
        """The delay of the codes behind the audio, in samples, for audio of a multiple of `config.pad_multiple`."""

    def init_state(self, batch: int = 1) -> StreamState:
        """Return the initial state of `batch` streams."""
        return self._stream.init_state(batch, None)

    def step(
        self, state: StreamState, audio: Float[Array | np.ndarray, "batch 1 samples"]
    ) -> tuple[StreamState, tuple[Int32[np.ndarray, "batch _"], ...]]:
        """Process the next audio.

        Args:
            state: the state of the streams.
            audio: (batch, 1, samples), with any number of samples.

        Returns:
            The new state, and the codes that are final, one (batch, frames / stride) array per level. Arrays may be
            empty.

        Raises:
            ValueError: if `audio` is invalid for `SNAC.encode`, or its batch size differs from that of the state.
        """
        with checked_audio(audio):
            new, codes = self._stream.step(state, [audio[:, 0]], self._stream.delay)
            return new, tuple(codes)

    def flush(self, state: StreamState) -> tuple[Int32[np.ndarray, "batch _"], ...]:
        """Return the remaining codes at the end of the streams. The audio is zero-padded as in `SNAC.encode`."""
        batch, samples = state.pending[0].shape
        padding = np.zeros((batch, -samples % self._config.pad_multiple), np.float32)
        last, codes = self._stream.step(state, [padding], self._stream.delay)
        tail = self._stream.tail(last, self._stream.delay)
        return tuple(np.concatenate(level, axis=1) for level in zip(codes, tail, strict=True))


def decoder_latency(config: SNACConfig, delay: Fraction, lookahead: int | None) -> int:
    """Return the delay of the audio behind the codes in samples. `delay` is that of exact audio in blocks.

    Raises:
        ValueError: if `lookahead` is negative or exceeds the receptive field.
    """
    exact = int(delay * config.pad_multiple)
    if lookahead is None:
        return exact
    max_lookahead = math.ceil(exact / config.hop_length)
    if not 0 <= lookahead <= max_lookahead:
        raise ValueError(f"`lookahead` (={lookahead}) must be between 0 and {max_lookahead} latent frames.")
    return min(exact, lookahead * config.hop_length)


class _Stream:
    """Encode or decode block by block. A block is `config.pad_multiple` samples, and the unit of time here.

    Args:
        apply: `_encode` or `_decode`.
        widths: values per block of each input of `apply`.
        dtype: of the inputs.
    """

    def __init__(self, model: SNAC, apply: Callable[..., Step], widths: Sequence[int], dtype: type[np.generic]):
        check_cuttable(model.config)
        self._model, self._apply = model, apply
        self._widths, self._dtype = widths, dtype
        self._block_frames = model.config.pad_multiple // model.config.hop_length
        self._shapes = step_shapes(apply, model, widths, dtype)
        self.delay = self._shapes.delay

    def init_state(self, batch: int, key: Array | None) -> StreamState:
        caches = tuple(jnp.zeros((batch, *cache.shape[1:]), cache.dtype) for cache in self._shapes.caches)
        return StreamState(0, tuple(np.zeros((batch, 0), self._dtype) for _ in self._widths), caches, key)

    def step(
        self, state: StreamState, inputs: Sequence[Array | np.ndarray], lag: Fraction
    ) -> tuple[StreamState, list[np.ndarray]]:
        """Process inputs. Return the new state, and the next outputs, up to `lag` blocks behind the input."""
        if len(inputs[0]) != len(state.pending[0]):
            raise ValueError(f"The batch size (={len(inputs[0])}) must be that of the state, {len(state.pending[0])}.")
        available = [
            np.concatenate([pending, np.asarray(new).astype(self._dtype)], axis=1)
            for pending, new in zip(state.pending, inputs, strict=True)
        ]
        num_blocks, caches, outputs = available[0].shape[1] // self._widths[0], state.caches, []
        before = int(state.frames)
        for i in range(num_blocks):
            block = [x[:, i * width : (i + 1) * width] for x, width in zip(available, self._widths, strict=True)]
            step = self._apply(self._model, block, caches, state.key, before + i * self._block_frames, FAR)
            outputs.append(step.outputs)
            caches = step.caches
        pending = tuple(x[:, num_blocks * width :] for x, width in zip(available, self._widths, strict=True))
        new = StreamState(before + num_blocks * self._block_frames, pending, caches, state.key)
        if num_blocks and lag < self.delay:
            outputs.append(self._outputs_at_end(new, self.delay - lag))
        start, end = Fraction(before, self._block_frames), Fraction(new.frames, self._block_frames)
        return new, self._between(
            outputs, start, max(start - lag, Fraction(0)), max(end - lag, Fraction(0)), len(pending[0])
        )

    def tail(self, state: StreamState, lag: Fraction) -> list[np.ndarray]:
        """Return the remaining outputs at the end of the streams, from `lag` blocks behind the input on."""
        end = Fraction(int(state.frames), self._block_frames)
        return self._between(
            [self._outputs_at_end(state, self.delay)], end, max(end - lag, Fraction(0)), end, len(state.pending[0])
        )

    def _outputs_at_end(self, state: StreamState, blocks: Fraction) -> list[Array]:
        """Return at least `blocks` blocks of the next outputs as if the streams ended here."""
        padding = [np.zeros((len(state.pending[0]), math.ceil(blocks) * width), self._dtype) for width in self._widths]
        return self._apply(self._model, padding, state.caches, state.key, state.frames, 0).outputs

    def _between(
        self, outputs: Sequence[list[Array]], start: Fraction, low: Fraction, high: Fraction, batch: int
    ) -> list[np.ndarray]:
        """Slice time `low` to `high` from the concatenated outputs, which belong to the input from time `start` on."""
        slices = []
        for i, shape in enumerate(self._shapes.outputs):
            width, empty = shape.shape[1], np.zeros((batch, 0), shape.dtype)
            joined = np.concatenate([empty, *(np.asarray(output[i]) for output in outputs)], axis=1)
            first = start - self.delay
            slices.append(joined[:, int((low - first) * width) : int((high - first) * width)])
        return slices


_encode, _decode = compiled(encode_step), compiled(decode_step)
