"""Pools of independent streams: the base of `StreamPool` and `StreamEncoderPool`.

Each stream has a slot, which is a row in the batch of one compiled step.
"""

import functools
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..codec.compiled import compiled
from ..codec.inputs import check_cuttable
from ..codec.model import SNAC
from .steps import FAR, Step, step_shapes

Output = TypeVar("Output")


class PoolFullError(RuntimeError):
    """All slots of a pool are in use."""


class Chunk(NamedTuple, Generic[Output]):
    """The next output of a stream.

    Attributes:
        stream: the stream.
        output: audio, (samples,), or one (frames / stride,) array of codes per level. It may be empty.
        last: whether this is the end of the stream. Its slot is free again.
    """

    stream: "PoolStream[Output]"
    output: Output
    last: bool


class PoolStep(NamedTuple, Generic[Output]):
    """What a step of a pool did.

    Attributes:
        chunks: the outputs of the streams that advanced or ended.
        active: number of streams that advanced.
        seconds: duration of the step.
    """

    chunks: list[Chunk[Output]]
    active: int
    seconds: float


class PoolStream(Generic[Output]):
    """A stream of a pool. Returned by `open`."""

    def __init__(self, pool: "Pool[Output]", slot: int, lag: Fraction):
        self.slot = slot
        """Index of the slot."""
        self._pool, self._lag = pool, lag
        self._pending = [np.zeros(0, pool._dtype) for _ in pool._widths]
        self._blocks = 0  # processed, including padding after the end
        self._end: int | None = None  # blocks of the whole stream, once it has ended
        self._emitted = Fraction(0)  # blocks of output

    @property
    def pending(self) -> int:
        """Number of blocks (multiples of `config.pad_multiple` samples) that wait to be processed."""
        return len(self._pending[0]) // self._pool._widths[0]

    def feed(self, values: Any) -> None:
        """Add input to the end of the stream. `StreamPool.step` takes one block at a time.

        Nothing limits how much may wait. Watch `pending`, and pause the source while it is large.

        Args:
            values: codes, one (frames / stride,) integer array per level, or audio, (samples,), to a
                `StreamEncoderPool`.

        Raises:
            ValueError: if `values` is invalid, or the stream has ended.
        """
        arrays = self._pool._check(values)
        with self._pool._lock:
            self._append(arrays)

    def end(self) -> None:
        """Mark the end of the input. The next steps return the rest of the output, and then free the slot.

        Raises:
            ValueError: if the stream has ended, or if the last attention window is not full.
        """
        with self._pool._lock:
            self._append(self._pool._padding(len(self._pending[0])))
            self._end = self._blocks + self.pending

    def abort(self) -> None:
        """Free the slot now, and drop the input and output that are left."""
        with self._pool._lock:
            self._pool._free_slot(self)

    def _append(self, arrays: Sequence[np.ndarray]) -> None:
        if self._end is not None or self._pool._streams[self.slot] is not self:
            raise ValueError("The stream has ended.")
        self._pending = [np.concatenate(pair) for pair in zip(self._pending, arrays, strict=True)]

    @property
    def _is_exact(self) -> bool:
        return self._lag == self._pool._delay

    @property
    def _can_advance(self) -> bool:
        """Whether there is a block to process: of input, or of padding after the end to get the last exact output."""
        return bool(self.pending) or (self._is_exact and self._end is not None and self._emitted < self._end)

    def _take_block(self) -> list[np.ndarray]:
        """Return the next block, which is empty after the end."""
        widths = self._pool._widths
        block = [x[:width] for x, width in zip(self._pending, widths, strict=True)]
        self._pending = [x[width:] for x, width in zip(self._pending, widths, strict=True)]
        self._blocks += 1
        return block


class Pool(ABC, Generic[Output]):
    """The streams of a pool and their shared state on the device.

    Time is in blocks of `config.pad_multiple` samples. After n blocks of a stream, its output is exact up to block
    `n - delay`. For the rest, a stream that ends processes blocks of padding. A stream with less lookahead has the rest
    computed in every step as if it ended there.
    """

    def __init__(
        self,
        model: SNAC,
        slots: int,
        apply: Callable[..., Step],
        widths: Sequence[int],
        dtype: type[np.generic],
        output_dtype: str,
        mesh: Mesh | None,
    ):
        check_cuttable(model.config)
        devices = 1 if mesh is None else mesh.size
        if slots < 1 or slots % devices:
            raise ValueError(f"`slots` (={slots}) must be a positive multiple of the number of devices, {devices}.")
        self._sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._model = model if mesh is None else jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
        self._config, self._widths, self._dtype, self._output_dtype = model.config, widths, dtype, output_dtype
        self._block_frames = model.config.pad_multiple // model.config.hop_length
        self._step, self._tail = _programs(apply, output_dtype)
        shapes = step_shapes(apply, model, widths, dtype, slots)
        self._delay = shapes.delay
        self._output_widths = [output.shape[1] for output in shapes.outputs]
        self._caches = self._put(tuple(jnp.zeros(cache.shape, cache.dtype) for cache in shapes.caches))
        self._keys: np.ndarray | None = None
        self._streams: list[PoolStream[Output] | None] = [None] * slots
        # Held while streams are changed, but not while a step is computed.
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Number of free slots."""
        return self._streams.count(None)

    def step(self) -> PoolStep[Output]:
        """Process one block of each stream that has one, so all advance at the same rate. Returns at once if none has.

        Call this from one thread. Other threads may open, feed, end and abort streams at the same time.
        """
        start = time.perf_counter()
        with self._lock:
            streams = [stream for stream in self._streams if stream is not None]
            advancing = [stream for stream in streams if stream._can_advance]
            ended = [stream for stream in streams if not stream._can_advance and stream._end is not None]
            block = self._take_blocks(advancing)
            cut = any(not stream._is_exact for stream in advancing + ended)
            blocks = self._vector({stream: stream._blocks for stream in streams})
        outputs = self._run(block) if advancing else []
        tail = self._run_tail(blocks) if cut else []
        with self._lock:
            # Streams that were aborted meanwhile get no output.
            chunks = [self._emit(stream, outputs, tail) for stream in advancing if self._is_open(stream)]
            chunks += [self._emit(stream, [], tail) for stream in ended if self._is_open(stream)]
            for chunk in chunks:
                if chunk.last:
                    self._free_slot(chunk.stream)
        return PoolStep(chunks, len(advancing), time.perf_counter() - start)

    def _open(self, lag: Fraction, key_data: np.ndarray | None = None) -> PoolStream[Output]:
        with self._lock:
            if None not in self._streams:
                raise PoolFullError(f"All {len(self._streams)} slots are in use.")
            stream = PoolStream(self, self._streams.index(None), lag)
            self._streams[stream.slot] = stream
            if self._keys is not None:
                self._keys[stream.slot] = key_data
        return stream

    def _is_open(self, stream: PoolStream[Output]) -> bool:
        return self._streams[stream.slot] is stream

    def _free_slot(self, stream: PoolStream[Output]) -> None:
        # The caches keep what they hold: it is before the start of the next stream, so the layers mask it.
        if self._is_open(stream):
            self._streams[stream.slot] = None

    def _take_blocks(self, streams: list[PoolStream[Output]]) -> "_Block":
        """Take the next block of each stream."""
        inputs = [np.zeros((len(self._streams), width), self._dtype) for width in self._widths]
        frames = self._vector({stream: stream._blocks for stream in streams})
        after = np.full(len(self._streams), FAR, np.int32)
        for stream in streams:
            if stream._end is not None:
                after[stream.slot] = min(FAR, (stream._end - stream._blocks) * self._block_frames)
            for rows, values in zip(inputs, stream._take_block(), strict=True):
                rows[stream.slot, : len(values)] = values
        active = np.zeros(len(self._streams), bool)
        active[[stream.slot for stream in streams]] = True
        return _Block(inputs, frames, after, active)

    def _vector(self, blocks: dict[PoolStream[Output], int]) -> np.ndarray:
        """Return a number of blocks for each stream in latent frames, (slots,)."""
        frames = np.zeros(len(self._streams), np.int32)
        for stream, count in blocks.items():
            frames[stream.slot] = count * self._block_frames
        return frames

    def _run(self, block: "_Block") -> list[np.ndarray]:
        inputs, keys, frames, after, active = self._put((block.inputs, self._keys, *block[1:]))
        outputs, self._caches = self._step(self._model, inputs, self._caches, keys, frames, after, active)
        return [np.asarray(output) for output in outputs]

    def _run_tail(self, frames: np.ndarray) -> list[np.ndarray]:
        """Return the outputs as if all streams ended after these frames."""
        blocks = math.ceil(self._delay)
        padding = [np.zeros((len(self._streams), blocks * width), self._dtype) for width in self._widths]
        inputs, keys, frames = self._put((padding, self._keys, frames))
        return [np.asarray(output) for output in self._tail(self._model, inputs, self._caches, keys, frames)]

    def _put(self, arrays: Any) -> Any:
        return jax.device_put(arrays, self._sharding)

    def _emit(self, stream: PoolStream[Output], outputs: list[np.ndarray], tail: list[np.ndarray]) -> Chunk[Output]:
        """Return the new output of a stream from its rows in the outputs of this step and of the tail."""
        position, end = stream._blocks, stream._end
        until = max(Fraction(0), position - stream._lag)
        if end is not None and (until > end or (position >= end and not stream._is_exact)):
            until = Fraction(end)
        first = position - bool(outputs) - self._delay  # in blocks, of the first output below
        parts = [outputs] * bool(outputs) + [tail] * (not stream._is_exact and bool(tail))
        values = []
        for i, width in enumerate(self._output_widths):
            low, high = int((stream._emitted - first) * width), int((until - first) * width)
            empty = np.zeros(0, self._output_dtype)  # a stream without input has no other parts
            values.append(np.concatenate([empty, *(part[i][stream.slot] for part in parts)])[low:high])
        stream._emitted = until
        return Chunk(stream, self._output(values), until == end)

    @abstractmethod
    def _check(self, values: Any) -> list[np.ndarray]:
        """Check the input of a stream and return it on the host."""

    @abstractmethod
    def _padding(self, pending: int) -> list[np.ndarray]:
        """Return the padding that fills the last block, of which `pending` values of the first input are there."""

    @abstractmethod
    def _output(self, values: list[np.ndarray]) -> Output: ...


class _Block(NamedTuple):
    """The next block of each slot.

    Attributes:
        inputs: (slots, width) each.
        frames: latent frames before the block, (slots,).
        after: latent frames to the end of the stream, (slots,).
        active: whether the slot has a block, (slots,).
    """

    inputs: list[np.ndarray]
    frames: np.ndarray
    after: np.ndarray
    active: np.ndarray


@functools.cache
def _programs(apply: Callable[..., Step], output_dtype: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the compiled step of a pool, and its outputs as if all streams ended."""

    def convert(output: Array) -> Array:
        if output_dtype == "int16":
            output = jnp.round(jnp.clip(output, -1, 1) * 32767)
        return output.astype(output_dtype)

    def step(
        model: SNAC, inputs: list[Array], caches: tuple[Array, ...], keys: Any, frames: Any, after: Any, active: Array
    ) -> tuple[list[Array], tuple[Array, ...]]:
        result = apply(model, inputs, caches, keys, frames, after)
        kept = [jnp.where(active[:, None, None], new, old) for new, old in zip(result.caches, caches, strict=True)]
        return [convert(output) for output in result.outputs], tuple(kept)

    def tail(model: SNAC, inputs: list[Array], caches: tuple[Array, ...], keys: Any, frames: Any) -> list[Array]:
        return [convert(output) for output in apply(model, inputs, caches, keys, frames, 0).outputs]

    return compiled(step, donate_argnums=(2,)), compiled(tail)
