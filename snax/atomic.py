"""Files that are there whole or not at all, whenever the process is killed."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

# A killed process leaves files of these names; nobody else makes any.
TEMPORARY = ".snax-{}.tmp"


@contextlib.contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """A name beside `target`; what is written there takes its place once it is on the disk, unless an error comes."""
    temporary = target.parent / TEMPORARY.format(secrets.token_hex(8))
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
