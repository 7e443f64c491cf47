"""Find the files of an argument: a file, a folder, a glob pattern, or an fsspec URL."""

import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem


class FoundFile(NamedTuple):
    """A file.

    Attributes:
        path: a local path or a URL.
        name: relative to the folder of the argument, or to the last folder before the first wildcard of a pattern.
        size: in bytes.
    """

    path: str
    name: str
    size: int


def open_fs(file: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or URL, and the path in that file system.

    Local paths are not parsed as URLs, because their names may contain `::`, with which fsspec chains URLs.
    """
    return fsspec.url_to_fs(file) if "://" in file else (LocalFileSystem(), posixpath.abspath(file))


def find_files(argument: str, suffixes: Sequence[str]) -> Iterator[FoundFile]:
    """Find files, sorted by path.

    Args:
        argument: a file, a folder or a glob pattern, as a path or URL. The path of an existing file or folder is never
            used as a pattern.
        suffixes: lower-case suffixes of the files to find in folders. Other files need to be named, or matched by a
            pattern.
    """
    system, path = open_fs(argument)

    def sizes_in(folder: str) -> dict[str, int]:
        entries = system.find(folder, detail=True).items()
        return {name: info["size"] for name, info in entries if name.lower().endswith(tuple(suffixes))}

    sizes: dict[str, int] = {}
    if system.isdir(path):
        root, sizes = path, sizes_in(path)
    elif system.exists(path):
        root, sizes = posixpath.dirname(path), {path: system.info(path)["size"]}
    else:
        root = posixpath.dirname(re.split(r"[*?\[]", path)[0])
        for name, info in system.glob(path, detail=True).items():
            sizes |= sizes_in(name) if info["type"] == "directory" else {name: info["size"]}
    for name in sorted(sizes):
        url = name if isinstance(system, LocalFileSystem) else system.unstrip_protocol(name)
        yield FoundFile(url, posixpath.relpath(name, root), sizes[name])
