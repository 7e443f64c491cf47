"""Decode clips in worker processes, so that a crash, a hang or a memory error affects only one clip.

The process pools of other libraries were tried. When a worker dies, they lose other clips too, or their workers survive
when the parent is killed. These workers exit when the pipe to the parent closes.
"""

import contextlib
import errno
import io
import itertools
import multiprocessing
import multiprocessing.connection
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from . import audio
from .files import open_fs
from .reading import Content, Unreadable

# Limits for one clip, in seconds and bytes. A day of audio at 44.1 kHz would need about 30 GB.
TIMEOUT_S, MEMORY_LIMIT = 600, 8 * 2**30
# The limit, in bytes, of decoded audio in the queue. Above it, decoding pauses, because clips can be hours long.
MAX_BUFFERED = 2 * 2**30

Tag = TypeVar("Tag")


class Decoded(NamedTuple):
    """The audio of a clip or the reason for its absence, and the decoding time in seconds."""

    audio: Float[np.ndarray, "channels samples"] | Unreadable
    seconds: float


class DecoderPool:
    """A pool of processes that read and decode clips.

    Args:
        count: number of processes.
        rate: see `snax.data.audio.read`.
        separate: see `snax.data.audio.read`.
        max_seconds: see `snax.data.audio.read`.
    """

    def __init__(self, count: int, rate: int, *, separate: bool, max_seconds: float):
        # The fork server imports this module once. Workers are forks of it, which start fast and share memory.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._options = (rate, separate, max_seconds)
        self._threads, self._reader = ThreadPoolExecutor(count, "decoder"), ThreadPoolExecutor(1, "reader")
        self._max_ahead = 2 * count
        self._thread_local = threading.local()
        self._workers: list[_Worker] = []

    def map(self, clips: Iterable[tuple[Tag, Content]]) -> Iterator[tuple[Tag, Decoded]]:
        """Decode clips ahead of their use and yield them in order.

        Args:
            clips: a tag, which is returned with the audio, and the content of each clip.

        Raises:
            OSError: if reading fails for a reason other than a bad clip, such as a permission, network or disk error.
            RuntimeError: if a decoder process cannot start.
        """
        clips, running = iter(clips), deque[tuple[Tag, Future[Decoded]]]()
        # The next clip is read from its table or tar while the caller uses the current one.
        next_clip: Future[tuple[Tag, Content] | None] = self._reader.submit(next, clips, None)
        while True:
            buffered = sum(_buffered_bytes(future) for _, future in running)
            if len(running) <= self._max_ahead and buffered <= MAX_BUFFERED:
                # The next clip may take long, for example if the caller waits for results before it gives more clips.
                first: list[Future[Any]] = [future for _, future in itertools.islice(running, 1)]
                wait([next_clip, *first], return_when=FIRST_COMPLETED)
                if next_clip.done():
                    clip = next_clip.result()
                    if clip is None:
                        break
                    next_clip = self._reader.submit(next, clips, None)
                    running.append((clip[0], self._threads.submit(self._decode, clip[1])))
                    continue
            tag, future = running.popleft()
            yield tag, future.result()
        for tag, future in running:
            yield tag, future.result()

    def close(self) -> None:
        """Kill the processes."""
        for threads in (self._reader, self._threads):
            threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def _decode(self, content: Content) -> Decoded:
        if isinstance(content, Unreadable):
            return Decoded(content, 0.0)
        worker: _Worker | None = getattr(self._thread_local, "worker", None)
        if worker is None or not worker.alive:
            worker = self._thread_local.worker = _Worker(self._context, self._options)
            self._workers.append(worker)
        return worker.decode(content)


def _buffered_bytes(future: Future[Decoded]) -> int:
    """Return the size of a decoded clip, or 0 if it is not decoded yet."""
    if not future.done() or future.exception() is not None:
        return 0
    audio = future.result().audio
    return 0 if isinstance(audio, Unreadable) else audio.nbytes


class _Worker:
    """The parent's handle of a worker process."""

    def __init__(self, context: Any, options: tuple[int, bool, float]):
        self._pipe, worker_pipe = context.Pipe()
        self._process = context.Process(target=_serve, args=(worker_pipe, *options), daemon=True)
        self._process.start()
        worker_pipe.close()
        try:
            self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            self.kill()
            raise RuntimeError(
                f"A decoder process ended at its start ({_exit_reason(self._process.exitcode)}). In a script, put the "
                'call under `if __name__ == "__main__":`, because decoder processes import the script.'
            ) from error
        self.alive = True

    def decode(self, content: bytes | str) -> Decoded:
        try:
            self._pipe.send(content)
            if not self._pipe.poll(TIMEOUT_S):
                self.end()
                return Decoded(Unreadable(f"reading and decoding timed out after {TIMEOUT_S} seconds."), TIMEOUT_S)
            answer, seconds = self._pipe.recv()
            if isinstance(answer, OSError):
                raise answer
            if isinstance(answer, Unreadable):
                return Decoded(answer, seconds)
            return Decoded(np.frombuffer(self._pipe.recv_bytes(), np.float32).reshape(answer), seconds)
        except (EOFError, ConnectionError):
            self.end()
            return Decoded(Unreadable(f"the decoder process crashed ({_exit_reason(self._process.exitcode)})."), 0.0)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def end(self) -> None:
        self.alive = False
        self.kill()
        self._pipe.close()


def _exit_reason(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _serve(pipe: multiprocessing.connection.Connection, rate: int, separate: bool, max_seconds: float) -> None:
    """Decode clips until the parent exits. Runs in the worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    if sys.platform == "linux":  # other systems accept RLIMIT_AS but do not enforce it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # The type of the error depends on the data in the pipe when the parent was killed.
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        pipe.send("ready")
        while True:
            content = pipe.recv()
            start = time.perf_counter()
            answer = _decode(content, rate, separate, max_seconds)
            seconds = time.perf_counter() - start
            if isinstance(answer, np.ndarray):
                pipe.send((answer.shape, seconds))
                pipe.send_bytes(answer.data)
            else:
                pipe.send((answer, seconds))


def _decode(content: bytes | str, rate: int, separate: bool, max_seconds: float) -> np.ndarray | Unreadable | OSError:
    if isinstance(content, str):
        # Read the whole file before decoding, so that a disk error is not mistaken for a bad clip.
        file_content = _read_file(content)
        if not isinstance(file_content, bytes):
            return file_content
        content = file_content
    try:
        return audio.read(io.BytesIO(content), rate, separate=separate, max_seconds=max_seconds)
    except MemoryError:
        return Unreadable(f"decoding needs more than {MEMORY_LIMIT} bytes of memory.")
    except Exception as error:  # decoding from memory fails only because of the clip
        return Unreadable(str(error) if isinstance(error, audio.AudioError) else f"{type(error).__name__}: {error}")


def _read_file(source: str) -> bytes | Unreadable | OSError:
    try:
        system, path = open_fs(source)
        if (kind := system.info(path)["type"]) != "file":  # reading from a pipe might never end
            return Unreadable("it is a folder." if kind == "directory" else "it is not a regular file.")
        with system.open(path, "rb") as file:
            content: bytes = file.read()
            return content
    except (FileNotFoundError, NotADirectoryError):
        return Unreadable("file not found.")
    except MemoryError:
        return Unreadable(f"decoding needs more than {MEMORY_LIMIT} bytes of memory.")
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return Unreadable("file not found.")
        return OSError(f"{source} cannot be read: {type(error).__name__}: {error}")
    except Exception as error:  # each storage backend has its own exception types
        return OSError(f"{source} cannot be read: {type(error).__name__}: {error}")
