"""The files that an argument names: a file, a folder, a pattern, or a URL of fsspec."""

import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem


class FoundFile(NamedTuple):
    """A file or an object of a URL."""

    path: str
    """A local path, or a URL."""
    name: str
    """Relative to the folder that the argument names, or to the folder in which its pattern begins."""
    size: int


def open_fs(file: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path there.

    Names of local files may hold anything, also `::`, which chains two systems in a URL of fsspec.
    """
    return fsspec.url_to_fs(file) if "://" in file else (LocalFileSystem(), posixpath.abspath(file))


def find_files(argument: str, suffixes: Sequence[str]) -> Iterator[FoundFile]:
    """The files that `argument` names, sorted.

    A file that is named, or matched by a pattern, is taken whatever its suffix; of a folder, files with one of
    `suffixes`. An existing file or folder is meant literally, even if its name looks like a pattern.
    """
    system, path = open_fs(argument)

    def inside(folder: str) -> dict[str, int]:
        found = system.find(folder, detail=True).items()
        return {name: facts["size"] for name, facts in found if name.lower().endswith(tuple(suffixes))}

    sizes: dict[str, int] = {}
    if system.isdir(path):
        root, sizes = path, inside(path)
    elif system.exists(path):
        root, sizes = posixpath.dirname(path), {path: system.info(path)["size"]}
    else:
        root = posixpath.dirname(re.split(r"[*?\[]", path)[0])
        for name, facts in system.glob(path, detail=True).items():
            sizes |= inside(name) if facts["type"] == "directory" else {name: facts["size"]}
    for name in sorted(sizes):
        url = name if isinstance(system, LocalFileSystem) else system.unstrip_protocol(name)
        yield FoundFile(url, posixpath.relpath(name, root), sizes[name])
