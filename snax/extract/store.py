"""The folder of an extraction, local or a URL of fsspec.

    tokens-00000-of-00024.parquet   a shard: one row a clip (and channel)
    _snax/job.json                  what all shards were made with; another run must have the same
    _snax/plan.parquet              which clips form which shard
    _snax/00000.json                a shard's sidecar: its sums and its hash. Written last: a shard without is none
    _quarantine.jsonl               the clips that could not be read, and why
    _SUCCESS                        the sums, once every clip is accounted for

A file is there whole or not at all. Locally it is written under another name, brought to the disk and renamed; a store
of objects (gs://, s3://) shows an object when all of it has come.
"""

import hashlib
import json
import posixpath
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from .. import json_text
from ..atomic import TEMPORARY, atomic_write
from ..data import corpus

SUCCESS, QUARANTINE, JOB, PLAN = "_SUCCESS", "_quarantine.jsonl", "_snax/job.json", "_snax/plan.parquet"

# What is counted, of a shard and of them all.
SUMS = ("clips", "committed", "rows", "samples", "tokens")


class StoreError(ValueError):
    """A folder that this run can't write to: what is there, and what to do."""


class Store:
    """A folder of shards."""

    def __init__(self, url: str):
        self.url = url
        self._system, self._root = fsspec.url_to_fs(url)
        self._local = isinstance(self._system, LocalFileSystem)

    def path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def read(self, name: str) -> bytes | None:
        """A file's content, None if it is not there."""
        try:
            content: bytes = self._system.cat_file(self.path(name))
            return content
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all, over what is there.

        Raises:
            OSError: if it can't be written; then nothing has changed.
        """
        if not self._local:
            self._system.pipe_file(self.path(name), content)
            return
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)

    def remove(self, name: str) -> None:
        """Removes a file that may be there."""
        if self._system.exists(self.path(name)):
            self._system.rm_file(self.path(name))

    def begin(self, shards: Sequence[Sequence[corpus.Source]], job: dict[str, Any]) -> None:
        """Makes the folder this job's, or finds that it is; sweeps what a killed run left. For one process.

        Raises:
            StoreError: if another job has begun here: other inputs, another model, another version.
        """
        if self._local:
            for folder in (Path(self._root), Path(self._root, "_snax")):
                for temporary in folder.glob(TEMPORARY.format("*")):
                    temporary.unlink()
        if self.read(JOB) is not None:
            self._check_same(job)
        elif self._system.exists(self._root) and self._system.find(self._root):
            raise StoreError(f"{self.url} has files of something else in it: give an empty folder, or a new one.")
        # The job first: it says whose the folder is, should this process end between the two.
        for name, content in ((JOB, json.dumps(job, indent=1).encode()), (PLAN, corpus.to_parquet(shards))):
            if self.read(name) != content:
                self.write(name, content)

    def join(self, make_job: Callable[[list[list[corpus.Source]]], dict[str, Any]]) -> list[list[corpus.Source]]:
        """The plan that another process has begun; `make_job` makes this one's job of it.

        Raises:
            StoreError: if this process would do another job: with other weights, say.
        """
        shards = corpus.from_parquet(self.read(PLAN) or b"")
        self._check_same(make_job(shards))
        return shards

    def _check_same(self, job: dict[str, Any]) -> None:
        there = _json(self.read(JOB))
        if there is None:
            raise StoreError(f"{self.url}/{JOB} is damaged, so nobody knows what its shards are of: give a new folder.")
        differing = [key for key in dict.fromkeys((*job, *there)) if job.get(key) != there.get(key)]
        if differing:
            differences = "\n".join(f"  {key}: {there.get(key)}, now {job.get(key)}" for key in differing)
            raise StoreError(
                f"{self.url} was begun with other inputs or settings, and shards of both would not fit together:\n"
                f"{differences}\nRun it as it was begun, or give a new folder."
            )

    def commit(self, shard: int, shards: int, table: bytes, sidecar: dict[str, Any]) -> None:
        """Adds a shard: first the table, then the sidecar that vouches for it."""
        said = sidecar | {"sha256": hashlib.sha256(table).hexdigest()}
        self.write(shard_name(shard, shards), table)
        self.write(_sidecar_name(shard), json.dumps(said, indent=1).encode())

    def sidecars(self, shards: Iterable[int]) -> list[dict[str, Any] | None]:
        """What these shards' sidecars say, None for those that are missing or can't be understood."""
        # Many at once: a store of objects takes as long for one as for sixteen.
        with ThreadPoolExecutor(16) as threads:
            said = [_json(content) or {} for content in threads.map(self.read, map(_sidecar_name, shards))]
        return [one if _is_sidecar(one) else None for one in said]

    def is_whole(self, shard: int, shards: int, sidecar: dict[str, Any]) -> bool:
        """Whether a shard is, to the byte, what its sidecar says."""
        table = self.read(shard_name(shard, shards))
        return table is not None and hashlib.sha256(table).hexdigest() == sidecar["sha256"]

    def finish(self, shards: Sequence[Sequence[corpus.Source]], rate: int) -> dict[str, Any]:
        """Accounts for every clip of the plan, writes the quarantine table and, last, `_SUCCESS`; the sums.

        Raises:
            StoreError: if a shard is missing or a clip is not accounted for.
        """
        sidecars = []
        for shard, (sources, sidecar) in enumerate(zip(shards, self.sidecars(range(len(shards))), strict=True)):
            if sidecar is None:
                raise StoreError(f"shard {shard} of {len(shards)} is missing: run the same command again.")
            sidecars.append(sidecar)
            accounted = sidecar["clips"] == sidecar["committed"] + len(sidecar["quarantined"])
            planned = sum(map(corpus.planned_clips, sources))
            if not accounted or (sources[0].kind != "tar" and sidecar["clips"] != planned):
                raise StoreError(
                    f"shard {shard} has {sidecar['committed']} clips and {len(sidecar['quarantined'])} in quarantine "
                    f"of {sidecar['clips']} that were read, and {planned} that were planned: please report this."
                )
        quarantined = [json.dumps(clip) + "\n" for sidecar in sidecars for clip in sidecar["quarantined"]]
        sums: dict[str, Any] = {key: sum(sidecar[key] for sidecar in sidecars) for key in SUMS}
        sums["hours"] = sums["samples"] / rate / 3600
        sums["quarantined"] = len(quarantined)
        sums["shards"] = [{"rows": sidecar["rows"], "sha256": sidecar["sha256"]} for sidecar in sidecars]
        for name, content in ((QUARANTINE, "".join(quarantined)), (SUCCESS, json.dumps(sums, indent=1))):
            if self.read(name) != content.encode():
                self.write(name, content.encode())
        return sums


def shard_name(shard: int, shards: int) -> str:
    """The name of a shard's file."""
    return f"tokens-{shard:05}-of-{shards:05}.parquet"


def _sidecar_name(shard: int) -> str:
    return f"_snax/{shard:05}.json"


def _is_sidecar(said: dict[str, Any]) -> bool:
    """Whether all is there that is asked of a sidecar, and of its kind."""
    counts = [said.get(name) for name in (*SUMS, "attempt")]
    counted = all(isinstance(count, int) and 0 <= count < 2**63 for count in counts)
    return counted and isinstance(said.get("quarantined"), list) and isinstance(said.get("sha256"), str)


def _json(content: bytes | None) -> dict[str, Any] | None:
    """An object of JSON; None for what is missing or damaged."""
    try:
        said = json_text.parse(content or b"")
    except ValueError:
        return None
    return said if isinstance(said, dict) else None
