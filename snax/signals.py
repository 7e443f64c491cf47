"""Signals that end a process, and how a process of a job ends."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax


def exit_on_sigterm() -> None:
    """From now on SIGTERM ends this process at once with `os.EX_TEMPFAIL` (75), even while it compiles.

    Python's handlers wait until the main thread is back from what it computes; what is written to the wakeup
    descriptor does not, and a thread reads it.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # without one nothing is written
    signal.set_wakeup_fd(write)

    def wait() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        print("snax: stopped by SIGTERM; the same command again goes on from here.", file=sys.stderr, flush=True)
        leave(os.EX_TEMPFAIL)

    threading.Thread(target=wait, daemon=True).start()


def leave(code: int) -> None:
    """Ends this process without waiting for the others, as JAX's own exit would: they notice and end too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def leaving_on_errors() -> Iterator[None]:
    """In a job of several processes an error in the block is said and ends this process at once: an orderly end would
    wait for the others, and they for this process."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        print(f"snax: process {jax.process_index()}: {type(error).__name__}: {error}", file=sys.stderr)
        leave(2)
