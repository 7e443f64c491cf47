"""Decode the streams of many clients with one `snax.StreamPool`, in an asyncio event loop."""

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
from jaxtyping import Int16, Integer

from ..codec.model import SNAC
from ..inference.pool import PoolStream
from ..inference.steps import decoder_widths
from ..inference.stream_pools import StreamPool
from .metrics import Metrics

# How far the codes of a stream may be ahead of its returned audio, in seconds of audio. More would only fill memory,
# because a client that plays the audio does not need it earlier.
MAX_AHEAD = 10.0


class BusyError(RuntimeError):
    """No slot became free in time, or the service is draining."""


class TooLongError(ValueError):
    """A stream has more audio, or a message more bytes, than the limit."""


class Session:
    """A stream of codes and its audio. Returned by `Service.open`. Close it, however the stream ends:

    with contextlib.closing(await service.open()) as session:
        await session.feed(codes)      # in one task, any number of times
        session.end()
        async for audio in session:    # in another task: (samples,) int16
            ...
    """

    def __init__(self, service: "Service", stream: PoolStream[Int16[np.ndarray, " samples"]]):
        self.samples = 0
        """Number of samples of audio that have been returned."""
        self._service, self._stream = service, stream
        self._fed = 0  # samples
        self._chunks: list[np.ndarray] = []
        self._finished = False
        self._error: Exception | None = None
        self._has_audio, self._has_room = asyncio.Event(), asyncio.Event()

    async def feed(self, codes: Sequence[Integer[np.ndarray, " _"]]) -> None:
        """Add codes, one (frames / stride,) array per level. Waits while the stream is `MAX_AHEAD` seconds ahead.

        Raises:
            TooLongError: if the stream gets longer than the service's `max_seconds`.
            ValueError: if the codes are invalid, or the stream has ended.
        """
        service = self._service
        groups = max(1, len(codes[0]) // service._group_codes)
        for i in range(groups):
            group = [level[i * len(level) // groups : (i + 1) * len(level) // groups] for level in codes]
            while self._fed - self.samples >= service._max_ahead and not self._finished:
                self._has_room.clear()
                await self._has_room.wait()
            self._fed += len(group[0]) // service._group_codes * service._group_samples
            if self._fed > service._max_samples:
                raise TooLongError(
                    f"The stream is longer than {service._max_samples / service.sampling_rate:g} s of audio. "
                    "Divide the text into several streams."
                )
            self._stream.feed(group)
            service._has_work.set()

    def end(self) -> None:
        """Mark the end of the codes.

        Raises:
            ValueError: if the stream has ended, or if the last attention window is not full.
        """
        self._stream.end()
        self._service._has_work.set()

    def close(self) -> None:
        """Free the slot, and drop input and audio that are left."""
        self._stream.abort()
        self._service._forget(self._stream)
        self._finish(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Int16[np.ndarray, " samples"]:
        """Return all audio that is there, and wait for some if there is none."""
        while not self._chunks and not self._finished:
            self._has_audio.clear()
            await self._has_audio.wait()
        if self._error is not None:
            raise RuntimeError("Decoding failed.") from self._error
        if not self._chunks:
            raise StopAsyncIteration
        audio = np.concatenate(self._chunks)
        self._chunks.clear()
        self.samples += len(audio)
        self._has_room.set()
        return audio

    def _add(self, audio: np.ndarray) -> None:
        if len(audio):
            self._chunks.append(audio)
            self._has_audio.set()

    def _finish(self, error: Exception | None) -> None:
        self._finished, self._error = True, error
        self._has_audio.set()
        self._has_room.set()


class Service:
    """Decode streams of int16 audio. All methods belong to one event loop; the steps of the pool run in a thread.

        async with Service(model, slots=16) as service:
            session = await service.open()

    Entering the context compiles the step of the pool.

    Args:
        model: the codec.
        slots: number of streams that are decoded at the same time.
        max_wait: seconds that `open` waits for a slot.
        max_seconds: seconds of audio in a stream.
    """

    def __init__(self, model: SNAC, slots: int = 16, *, max_wait: float = 2.0, max_seconds: float = 600.0):
        config = model.config
        self.slots, self.sampling_rate = slots, config.sampling_rate
        self.draining = False
        """Whether new streams are rejected."""
        self.error: Exception | None = None
        """The error of a step, after which the pool cannot be used any more."""
        self.metrics = Metrics(lambda: self.active, lambda: self.waiting)
        self._pool = StreamPool(model, slots, dtype="int16")
        self._block = [np.zeros(width, np.int32) for width in decoder_widths(config)]
        group_frames = math.lcm(*config.vq_strides)
        self._group_codes, self._group_samples = group_frames // config.vq_strides[0], group_frames * config.hop_length
        self._max_wait, self._max_samples = max_wait, max_seconds * config.sampling_rate
        # The pool needs the rest of a block, and some more as its delay, before it returns audio.
        self._max_ahead = max(MAX_AHEAD * config.sampling_rate, 4 * config.pad_multiple)
        self._sessions: dict[PoolStream[np.ndarray], Session] = {}
        self._queue = deque[asyncio.Event]()
        self._has_work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snax-pool")

    @property
    def active(self) -> int:
        """Number of slots in use."""
        return self.slots - self._pool.free

    @property
    def waiting(self) -> int:
        """Number of streams that wait for a slot."""
        return len(self._queue)

    async def open(self) -> Session:
        """Open a stream. Waits for a slot if none is free, in order of arrival.

        Raises:
            BusyError: if no slot becomes free within `max_wait` seconds, or if the service is draining.
        """
        if self.draining:
            raise BusyError("The server is shutting down. Try another one, or try again later.")
        try:
            async with asyncio.timeout(self._max_wait):
                with self._place_in_queue() as place:
                    while self._queue[0] is not place or not self._pool.free:
                        place.clear()
                        await place.wait()
                    stream = self._pool.open()
        except TimeoutError:
            raise BusyError(
                f"All {self.slots} slots are in use, and none became free within {self._max_wait:g} s. Try again later."
            ) from None
        session = self._sessions[stream] = Session(self, stream)
        return session

    async def __aenter__(self) -> Self:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._compile)
        self._task = asyncio.create_task(self._decode())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._task.cancel()
        self._thread.shutdown()
        for session in list(self._sessions.values()):
            session.close()

    def _compile(self) -> None:
        stream = self._pool.open()
        stream.feed(self._block)
        stream.end()
        while not self._pool.step().chunks[0].last:
            pass

    async def _decode(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._has_work.clear()
                step = await loop.run_in_executor(self._thread, self._pool.step)
                samples = sum(len(chunk.output) for chunk in step.chunks)
                if step.active:
                    self.metrics.count_step(step.seconds, samples / self.sampling_rate)
                for stream, audio, last in step.chunks:
                    if (session := self._sessions.get(stream)) is None:
                        continue  # closed after the step
                    session._add(audio)
                    if last:
                        session._finish(None)
                        self._forget(stream)
                if not step.chunks:
                    await self._has_work.wait()
        except Exception as error:
            self.error = error
            for session in self._sessions.values():
                session._finish(error)

    def _forget(self, stream: PoolStream[np.ndarray]) -> None:
        """Drop a stream that has left the pool, and let the next one in."""
        self._sessions.pop(stream, None)
        self._wake_first()

    def _wake_first(self) -> None:
        if self._queue and self._pool.free:
            self._queue[0].set()

    @contextlib.contextmanager
    def _place_in_queue(self) -> Iterator[asyncio.Event]:
        place = asyncio.Event()
        self._queue.append(place)
        try:
            yield place
        finally:
            self._queue.remove(place)
            self._wake_first()
