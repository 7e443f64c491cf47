"""Clips to audio, in processes of their own: a decoder that crashes, hangs or takes all memory harms its clip alone.

(A library's pool would do, but those tried either lose the other clips with a process that dies, or leave processes
behind when their parent is killed. These end with the pipe to it.)
"""

import contextlib
import errno
import io
import multiprocessing
import multiprocessing.connection
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from . import audio
from .files import open_fs
from .reading import Content, Unreadable

# Of one clip: what takes longer hangs, what takes more is a bomb. A day of audio at 44.1 kHz takes some 30 GB.
TIMEOUT_S, MEMORY_LIMIT = 600, 8 * 2**30
# Of decoded audio that waits: no more clips are begun then, since they may be hours long.
MAX_BUFFERED = 2 * 2**30


Tag = TypeVar("Tag")


class Decoded(NamedTuple):
    """A clip's audio, or why there is none, and the seconds that a decoder took for it."""

    audio: Float[np.ndarray, "channels samples"] | Unreadable
    seconds: float


class DecoderPool:
    """A pool of processes that read and decode clips.

    Args:
        count: of processes.
        rate, separate, max_seconds: as in `snax.data.audio.read`.
    """

    def __init__(self, count: int, rate: int, *, separate: bool, max_seconds: float):
        # One process imports what all need; each decoder is a fork of it, which takes no time and little memory.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._how = (rate, separate, max_seconds)
        self._threads, self._reader = ThreadPoolExecutor(count, "decoder"), ThreadPoolExecutor(1, "reader")
        self._ahead = 2 * count
        self._of_this_thread = threading.local()
        self._all: list[_Process] = []

    def map(self, clips: Iterable[tuple[Tag, Content]]) -> Iterator[tuple[Tag, Decoded]]:
        """What each clip's content holds, in order, decoded ahead.

        Raises:
            OSError: for what can't be read for no fault of the clip's: no permission, a broken network or disk.
        """
        running: deque[tuple[Tag, Future[Decoded]]] = deque()
        for tag, content in self._read_ahead(clips):
            running.append((tag, self._threads.submit(self._decode, content)))
            while len(running) > self._ahead or sum(_bytes_of(future) for _, future in running) > MAX_BUFFERED:
                tag, future = running.popleft()
                yield tag, future.result()
        for tag, future in running:
            yield tag, future.result()

    def _read_ahead(self, clips: Iterable[tuple[Tag, Content]]) -> Iterator[tuple[Tag, Content]]:
        """The clips, each read from its table or tar while its predecessor is under way."""
        clips = iter(clips)
        following = self._reader.submit(next, clips, None)
        while (item := following.result()) is not None:
            following = self._reader.submit(next, clips, None)
            yield item

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        for threads in (self._reader, self._threads):
            threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.kill()

    def _decode(self, content: Content) -> Decoded:
        if isinstance(content, Unreadable):
            return Decoded(content, 0.0)
        process: _Process | None = getattr(self._of_this_thread, "process", None)
        if process is None or not process.alive:
            process = self._of_this_thread.process = _Process(self._context, self._how)
            self._all.append(process)
        return process.decode(content)


def _bytes_of(future: Future[Decoded]) -> int:
    """Of the audio that a clip turned out to be, if it is there."""
    if not future.done() or future.exception() is not None:
        return 0
    audio = future.result().audio
    return 0 if isinstance(audio, Unreadable) else audio.nbytes


class _Process:
    """One decoder, as its parent sees it."""

    def __init__(self, context: Any, how: tuple[int, bool, float]):
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *how), daemon=True)
        self._process.start()
        theirs.close()
        self.alive = True

    def decode(self, content: bytes | str) -> Decoded:
        try:
            self._pipe.send(content)
            if not self._pipe.poll(TIMEOUT_S):
                self.end()
                return Decoded(Unreadable(f"takes more than {TIMEOUT_S} seconds to read and decode."), TIMEOUT_S)
            answer, seconds = self._pipe.recv()
            if isinstance(answer, OSError):
                raise answer
            if isinstance(answer, Unreadable):
                return Decoded(answer, seconds)
            return Decoded(np.frombuffer(self._pipe.recv_bytes(), np.float32).reshape(answer), seconds)
        except (EOFError, ConnectionError):
            self.end()
            return Decoded(Unreadable(f"crashes its decoder ({_how_it_ended(self._process.exitcode)})."), 0.0)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def end(self) -> None:
        self.alive = False
        self.kill()
        self._pipe.close()


def _how_it_ended(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _serve(pipe: multiprocessing.connection.Connection, rate: int, separate: bool, max_seconds: float) -> None:
    """What a decoder does: takes clips until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    if sys.platform == "linux":  # elsewhere there is a limit in name only
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # How a pipe ends depends on what was in it when the parent was killed.
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            content = pipe.recv()
            begin = time.perf_counter()
            answer = _decoded(content, rate, separate, max_seconds)
            seconds = time.perf_counter() - begin
            if isinstance(answer, np.ndarray):
                pipe.send((answer.shape, seconds))
                pipe.send_bytes(answer.data)
            else:
                pipe.send((answer, seconds))


def _decoded(content: bytes | str, rate: int, separate: bool, max_seconds: float) -> np.ndarray | Unreadable | OSError:
    if isinstance(content, str):
        # Read whole before anything is decoded: so an error of the disk is not taken for one of the clip.
        found = _bytes(content)
        if not isinstance(found, bytes):
            return found
        content = found
    try:
        return audio.read(io.BytesIO(content), rate, separate=separate, max_seconds=max_seconds)
    except MemoryError:
        return Unreadable(f"takes more than {MEMORY_LIMIT} bytes of memory.")
    except Exception as error:  # from memory nothing fails but the clip
        return Unreadable(str(error) if isinstance(error, audio.AudioError) else f"{type(error).__name__}: {error}")


def _bytes(source: str) -> bytes | Unreadable | OSError:
    try:
        system, path = open_fs(source)
        if (kind := system.info(path)["type"]) != "file":  # a pipe, say, which would never end
            return Unreadable("is a folder." if kind == "directory" else "is no regular file.")
        with system.open(path, "rb") as file:
            content: bytes = file.read()
            return content
    except (FileNotFoundError, NotADirectoryError):
        return Unreadable("is not there.")
    except MemoryError:
        return Unreadable(f"takes more than {MEMORY_LIMIT} bytes of memory.")
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return Unreadable("is not there.")
        return OSError(f"{source} can't be read: {type(error).__name__}: {error}")
    except Exception as error:  # each kind of storage has its own
        return OSError(f"{source} can't be read: {type(error).__name__}: {error}")
