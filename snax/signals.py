"""Exit on SIGTERM, and on errors in multi-process jobs."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax

_log = logging.getLogger(__name__)


def exit_on_sigterm() -> None:
    """Make SIGTERM end this process at once with exit code `os.EX_TEMPFAIL` (75), even during compilation.

    Python runs signal handlers in the main thread, after its current C++ call returns. The wakeup file descriptor is
    written immediately, and a thread reads it.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # Python writes to the descriptor only with a handler
    signal.set_wakeup_fd(write)

    def wait() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        _log.warning("stopped by SIGTERM. Run the same command again to resume.")
        exit_now(os.EX_TEMPFAIL)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[threading.Event]:
    """Within this context, SIGTERM sets an event and does nothing else. Must be entered in the main thread."""
    received = threading.Event()
    descriptor = signal.set_wakeup_fd(-1)
    handler = signal.signal(signal.SIGTERM, lambda number, frame: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.set_wakeup_fd(descriptor)


def exit_now(code: int) -> None:
    """Exit at once. JAX's exit handler would wait for the other processes, which detect this exit and exit too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Log an exception and exit at once if the job has several processes.

    A normal exit would deadlock: this process would wait for the others, and they for this process.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        _log.error("process %d: %s: %s", jax.process_index(), type(error).__name__, error)
        exit_now(2)
