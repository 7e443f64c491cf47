"""Atomic file writes: a file is complete or absent, even if the process is killed."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

# A killed process can leave files with such a name. They are safe to delete.
TEMPORARY = ".snax-{}.tmp"


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to `target`. On success the file is synced to disk and replaces `target`."""
    temporary = target.parent / TEMPORARY.format(secrets.token_hex(8))
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Flush a file's content or a directory's entries to disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
