"""Streaming: each layer keeps the end of its input, so that nothing is computed twice.

A layer that sees future steps delays its output; these delays add up to the latency. The concatenated output equals
that of `SNAC.encode` and `SNAC.decode` on the whole. State is explicit: a pytree that is passed in and returned.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int32, Integer, Key, PRNGKeyArray

from ..codec.compiled import compiled
from ..codec.inputs import check_audio, check_codes, check_cuttable
from ..codec.model import SNAC, draw_noise
from .step_layers import Align, step_layers


class StreamState(NamedTuple):
    """The state of a batch of streams that advance together. A pytree; the first axis of arrays is the batch."""

    frames: int  # latent frames processed so far
    pending: tuple[np.ndarray, ...]  # input that waits for more
    caches: tuple[Array, ...]
    key: PRNGKeyArray | Key[Array, " batch"] | None


class StreamDecoder:
    """Decode codes as they arrive. The samples equal those of `SNAC.decode` on all codes.

        decoder = snax.StreamDecoder(model)
        state = decoder.init_state()
        for codes in ...:                            # for each level (batch, frames / stride)
            state, audio = decoder.step(state, codes)
        audio = decoder.flush(state)

    The first `step` and the first `flush` compile; later ones do not.

    Args:
        model: the codec.
        lookahead: latent frames to wait for before audio is returned. Default: the decoder's receptive field (10 frames
            at 24 kHz), for exact audio. With fewer, the end of each step is decoded as if the stream ended there;
            benchmarks/README.md has the error.

    Raises:
        ValueError: if `lookahead` is negative or exceeds the receptive field.
    """

    def __init__(self, model: SNAC, *, lookahead: int | None = None):
        config = model.config
        block_frames = config.pad_multiple // config.hop_length
        self._config = config
        self._stream = _Stream(model, _decode, [block_frames // stride for stride in config.vq_strides], np.int32)
        exact = self._stream.delay * config.pad_multiple
        self.latency = int(exact)
        """The delay of the audio behind the codes, in samples."""
        if lookahead is not None:
            if not 0 <= lookahead <= math.ceil(exact / config.hop_length):
                most = math.ceil(exact / config.hop_length)
                raise ValueError(f"lookahead (={lookahead}) must be between 0 and {most} latent frames.")
            self.latency = min(self.latency, lookahead * config.hop_length)

    def init_state(self, batch: int = 1, *, key: PRNGKeyArray | Key[Array, " batch"] | None = None) -> StreamState:
        """The state of `batch` streams before their first codes; `key` as in `SNAC.decode`."""
        return self._stream.init_state(batch, key)

    def step(
        self, state: StreamState, codes: Sequence[Integer[Array | np.ndarray, "batch _"]]
    ) -> tuple[StreamState, Float[np.ndarray, "batch 1 samples"]]:
        """Process the next codes, a whole number of coarse frames, and return the samples that are now final.

        With attention, samples are returned once the window of their codes is full.

        Raises:
            ValueError: for codes that `SNAC.decode` refuses, or of another batch size than the state's.
        """
        check_codes(codes, self._config)
        new, (audio,) = self._stream.step(state, codes, self._lag)
        return new, audio[:, None]

    def flush(self, state: StreamState) -> Float[np.ndarray, "batch 1 samples"]:
        """Return the remaining samples after the last codes.

        Raises:
            ValueError: if the last attention window is not full.
        """
        if state.pending[0].shape[1]:
            frames = state.pending[0].shape[1] * self._config.vq_strides[0]
            raise ValueError(
                f"the stream ends {frames} latent frames into an attention window of {self._config.attn_window_size}: "
                "pass codes for all of it."
            )
        return self._stream.tail(state, self._lag)[0][:, None]

    @property
    def _lag(self) -> Fraction:
        return Fraction(self.latency, self._config.pad_multiple)


class StreamEncoder:
    """Encode audio as it arrives. The codes equal those of `SNAC.encode` on all audio. Used like `StreamDecoder`."""

    def __init__(self, model: SNAC):
        self._config = model.config
        self._stream = _Stream(model, _encode, [model.config.pad_multiple], np.float32)
        self.latency = int(self._stream.delay * model.config.pad_multiple)
        """The delay of the codes behind the audio, in samples, for audio of whole pad multiples."""

    def init_state(self, batch: int = 1) -> StreamState:
        """The state of `batch` streams before their first audio."""
        return self._stream.init_state(batch, None)

    def step(
        self, state: StreamState, audio: Float[Array | np.ndarray, "batch 1 samples"]
    ) -> tuple[StreamState, tuple[Int32[np.ndarray, "batch _"], ...]]:
        """Process the next audio, any number of samples, and return the codes that are now final, possibly none.

        Raises:
            ValueError: for audio that `SNAC.encode` refuses, or of another batch size than the state's.
        """
        check_audio(audio)
        new, codes = self._stream.step(state, [audio[:, 0]], self._stream.delay)
        return new, tuple(codes)

    def flush(self, state: StreamState) -> tuple[Int32[np.ndarray, "batch _"], ...]:
        """Return the remaining codes after the last audio, which is zero-padded as by `SNAC.encode`."""
        batch, samples = state.pending[0].shape
        padding = np.zeros((batch, -samples % self._config.pad_multiple), np.float32)
        last, codes = self._stream.step(state, [padding], self._stream.delay)
        tail = self._stream.tail(last, self._stream.delay)
        return tuple(np.concatenate(level, axis=1) for level in zip(codes, tail, strict=True))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["outputs", "caches"], meta_fields=["delay"])
@dataclasses.dataclass(frozen=True)
class _Output:
    """The outputs of a step, each (batch, values in time), `delay` blocks behind the input; or their shapes."""

    outputs: list[Any]
    caches: tuple[Any, ...]
    delay: Fraction


class _Stream:
    """Encode or decode block by block. A block is `config.pad_multiple` samples, and the unit of time here.

    Args:
        apply: `_encode` or `_decode`.
        widths: values that each of its inputs has for a block.
        dtype: of the inputs.
    """

    def __init__(self, model: SNAC, apply: Callable[..., _Output], widths: Sequence[int], dtype: type[np.generic]):
        check_cuttable(model.config)
        self._model, self._apply, self._widths, self._dtype = model, apply, widths, dtype
        self._block_frames = model.config.pad_multiple // model.config.hop_length
        block = [jax.ShapeDtypeStruct((1, width), dtype) for width in widths]
        self._shapes = jax.eval_shape(apply, model, block, None, None, 0, False)
        self.delay = self._shapes.delay

    def init_state(self, batch: int, key: Array | None) -> StreamState:
        caches = tuple(jnp.zeros((batch, *cache.shape[1:]), cache.dtype) for cache in self._shapes.caches)
        return StreamState(0, tuple(np.zeros((batch, 0), self._dtype) for _ in self._widths), caches, key)

    def step(
        self, state: StreamState, inputs: Sequence[Array | np.ndarray], lag: Fraction
    ) -> tuple[StreamState, list[np.ndarray]]:
        """Process `inputs`. Returns the new state, and the outputs that are `lag` blocks old by now."""
        if len(inputs[0]) != len(state.pending[0]):
            raise ValueError(f"the state is one of {len(state.pending[0])} streams, got a batch of {len(inputs[0])}.")
        arrived = [
            np.concatenate([pending, np.asarray(new).astype(self._dtype)], axis=1)
            for pending, new in zip(state.pending, inputs, strict=True)
        ]
        num_blocks, caches, outputs = arrived[0].shape[1] // self._widths[0], state.caches, []
        before = int(state.frames)
        for i in range(num_blocks):
            block = [x[:, i * width : (i + 1) * width] for x, width in zip(arrived, self._widths, strict=True)]
            step = self._apply(self._model, block, caches, state.key, before + i * self._block_frames, False)
            outputs.append(step.outputs)
            caches = step.caches
        pending = tuple(x[:, num_blocks * width :] for x, width in zip(arrived, self._widths, strict=True))
        new = StreamState(before + num_blocks * self._block_frames, pending, caches, state.key)
        if num_blocks and lag < self.delay:
            outputs.append(self._ending(new, self.delay - lag))
        begin, end = Fraction(before, self._block_frames), Fraction(new.frames, self._block_frames)
        return new, self._between(
            outputs, begin, max(begin - lag, Fraction(0)), max(end - lag, Fraction(0)), len(pending[0])
        )

    def tail(self, state: StreamState, lag: Fraction) -> list[np.ndarray]:
        """The outputs that are not yet `lag` blocks old, of streams that end here."""
        end = Fraction(int(state.frames), self._block_frames)
        return self._between(
            [self._ending(state, self.delay)], end, max(end - lag, Fraction(0)), end, len(state.pending[0])
        )

    def _ending(self, state: StreamState, blocks: Fraction) -> list[Array]:
        """The next outputs, at least `blocks` of them, if the streams end here."""
        nothing = [np.zeros((len(state.pending[0]), math.ceil(blocks) * width), self._dtype) for width in self._widths]
        return self._apply(self._model, nothing, state.caches, state.key, state.frames, True).outputs

    def _between(
        self, outputs: Sequence[list[Array]], begin: Fraction, low: Fraction, high: Fraction, batch: int
    ) -> list[np.ndarray]:
        """The outputs from time `low` to `high`, of `outputs` for input from time `begin` on."""
        between = []
        for i, shape in enumerate(self._shapes.outputs):
            width, nothing = shape.shape[1], np.zeros((batch, 0), shape.dtype)
            joined = np.concatenate([nothing, *(np.asarray(output[i]) for output in outputs)], axis=1)
            first = begin - self.delay
            between.append(joined[:, int((low - first) * width) : int((high - first) * width)])
        return between


@compiled
def _encode(
    model: SNAC,
    inputs: list[Array],
    past: Sequence[Array] | None,
    key: None,
    frames: int | Array,
    ended: bool | Array,
) -> _Output:
    config = model.config
    layers = [*model.encoder.layers, Align(math.lcm(*config.vq_strides))]
    audio = inputs[0][..., None].astype(model.dtype)
    latents, caches, delay = step_layers(layers, audio, config.hop_length, past, frames, ended)
    codes = model.quantizer(latents).codes
    return _Output(list(codes), caches, Fraction(delay * config.hop_length, config.pad_multiple))


@compiled
def _decode(
    model: SNAC,
    inputs: list[Array],
    past: Sequence[Array] | None,
    key: Array | None,
    frames: int | Array,
    ended: bool | Array,
) -> _Output:
    config = model.config
    latents = model.quantizer.dequantize(inputs)
    draw = None if key is None else functools.partial(draw_noise, config, key)
    audio, caches, delay = step_layers(model.decoder.layers, latents, 1, past, frames, ended, draw)
    return _Output([audio[..., 0]], caches, Fraction(delay, config.pad_multiple))
