"""The output directory of an extraction: local, or a URL of fsspec.

    tokens-00000-of-00024.parquet   a shard: one row per clip (and channel)
    _snax/job.json                  what all shards are made with. Every run must match it
    _snax/plan.parquet              which clips form which shard
    _snax/00000.json                a shard's sidecar: its counts and its hash. Written last: it commits the shard
    _quarantine.jsonl               the clips that could not be read, and why
    _SUCCESS                        the totals. Written when every clip is accounted for

Every write is atomic. A local file is written under a temporary name, flushed to disk and renamed. Object stores (gs://,
s3://) make an object visible only after a complete upload.
"""

import hashlib
import json
import logging
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

_log = logging.getLogger(__name__)

SUCCESS, QUARANTINE, JOB, PLAN = "_SUCCESS", "_quarantine.jsonl", "_snax/job.json", "_snax/plan.parquet"

# The counts of a shard in its sidecar, whose totals are in `_SUCCESS`.
COUNTS = ("clips", "committed", "rows", "samples", "tokens")


class StoreError(ValueError):
    """The output directory cannot be used by this run."""


class Store:
    """The output directory of an extraction.

    Args:
        url: a local path or a URL of fsspec.
    """

    def __init__(self, url: str):
        self.url = url
        self._system, self._root = fsspec.url_to_fs(url)
        self._local = isinstance(self._system, LocalFileSystem)

    def path(self, name: str) -> str:
        """Return the path of a file in the store's file system."""
        return posixpath.join(self._root, name)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
        try:
            content: bytes = self._system.cat_file(self.path(name))
            return content
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically. An existing file is replaced.

        Raises:
            OSError: if the file cannot be written. An existing file is then unchanged.
        """
        if not self._local:
            self._system.pipe_file(self.path(name), content)
            return
        path = Path(self.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self._system.exists(self.path(name)):
            self._system.rm_file(self.path(name))

    def begin(self, shards: Sequence[Sequence[corpus.Source]], job: dict[str, Any]) -> None:
        """Prepare the directory for a job, or check that it already belongs to it. Called by one process.

        Temporary files of a killed run are removed.

        Args:
            shards: the plan.
            job: what the bytes of the shards depend on.

        Raises:
            StoreError: if the directory belongs to a job with other inputs, another model or another version of snax,
                or holds unrelated files.
        """
        if self._local:
            for folder in (Path(self._root), Path(self._root, "_snax")):
                for temporary in folder.glob(TEMPORARY.format("*")):
                    temporary.unlink()
        if self.read(JOB) is not None:
            self._check_same(job)
        elif self._system.exists(self._root) and self._system.find(self._root):
            raise StoreError(
                f"{self.url} holds files that do not belong to an extraction. Use an empty or a new output directory."
            )
        # The job comes first. If the process ends between the two writes, the directory still belongs to the job.
        for name, content in ((JOB, json.dumps(job, indent=1).encode()), (PLAN, corpus.to_parquet(shards))):
            if self.read(name) != content:
                self.write(name, content)

    def join(self, make_job: Callable[[list[list[corpus.Source]]], dict[str, Any]]) -> list[list[corpus.Source]]:
        """Return the plan that process 0 has written, and check that this process has the same job.

        Args:
            make_job: returns the job of this process for a plan.

        Raises:
            StoreError: if the job of this process differs, for example in its weights.
        """
        shards = corpus.from_parquet(self.read(PLAN) or b"")
        self._check_same(make_job(shards))
        return shards

    def _check_same(self, job: dict[str, Any]) -> None:
        existing = _parse_object(self.read(JOB))
        if existing is None:
            raise StoreError(
                f"{self.url}/{JOB} is corrupt, so its shards cannot be verified. Use a new output directory."
            )
        differing = [key for key in dict.fromkeys((*job, *existing)) if job.get(key) != existing.get(key)]
        if differing:
            differences = "\n".join(f"  {key}: {existing.get(key)}, now {job.get(key)}" for key in differing)
            raise StoreError(
                f"{self.url} holds shards made from other inputs or settings:\n{differences}\n"
                "Repeat the original command, or use a new output directory."
            )

    def commit(self, shard: int, shards: int, table: bytes, sidecar: dict[str, Any]) -> None:
        """Commit a shard: write its table, then its sidecar with the hash of the table."""
        content = sidecar | {"sha256": hashlib.sha256(table).hexdigest()}
        self.write(shard_name(shard, shards), table)
        self.write(_sidecar_name(shard), json.dumps(content, indent=1).encode())

    def sidecars(self, shards: Iterable[int]) -> list[dict[str, Any] | None]:
        """Return the sidecars of these shards, with None for those that are missing or corrupt."""
        # Object stores take as long for one read as for sixteen concurrent ones.
        with ThreadPoolExecutor(16) as threads:
            sidecars = [_parse_object(content) or {} for content in threads.map(self.read, map(_sidecar_name, shards))]
        return [sidecar if _is_sidecar(sidecar) else None for sidecar in sidecars]

    def attempts(self, indices: Iterable[int], shards: int, *, retry: bool) -> dict[int, int]:
        """Return which of these shards are still to be made, each with the number of this attempt.

        Args:
            indices: indices of shards.
            shards: the number of shards of the plan.
            retry: make shards with clips in quarantine again.
        """
        attempts = {}
        indices = list(indices)
        for shard, sidecar in zip(indices, self.sidecars(indices), strict=True):
            if sidecar is None:
                attempts[shard] = 1
            elif not self.is_whole(shard, shards, sidecar):
                _log.warning("shard %d does not match the hash in its sidecar; it will be made again", shard)
                attempts[shard] = sidecar["attempt"] + 1
            elif retry and sidecar["quarantined"]:
                attempts[shard] = sidecar["attempt"] + 1
        return attempts

    def is_whole(self, shard: int, shards: int, sidecar: dict[str, Any]) -> bool:
        """Return whether a shard exists and matches the hash in its sidecar."""
        table = self.read(shard_name(shard, shards))
        return table is not None and hashlib.sha256(table).hexdigest() == sidecar["sha256"]

    def finish(self, shards: Sequence[Sequence[corpus.Source]], rate: int) -> dict[str, Any]:
        """Check that every clip of the plan is accounted for, and write `_quarantine.jsonl` and `_SUCCESS`.

        Args:
            shards: the plan.
            rate: sampling rate of the model in Hz.

        Returns:
            The totals, as in `_SUCCESS`.

        Raises:
            StoreError: if a shard is missing or a clip is not accounted for.
        """
        sidecars = []
        for shard, (sources, sidecar) in enumerate(zip(shards, self.sidecars(range(len(shards))), strict=True)):
            if sidecar is None:
                raise StoreError(f"Shard {shard} of {len(shards)} is missing or corrupt. Run the same command again.")
            sidecars.append(sidecar)
            accounted = sidecar["clips"] == sidecar["committed"] + len(sidecar["quarantined"])
            planned = sum(map(corpus.planned_clips, sources))
            if not accounted or (sources[0].kind != "tar" and sidecar["clips"] != planned):
                raise StoreError(
                    f"Shard {shard} was planned with {planned} clips; {sidecar['clips']} were read, "
                    f"{sidecar['committed']} were encoded and {len(sidecar['quarantined'])} are in quarantine. "
                    "Please report this."
                )
        quarantined = [json.dumps(clip) + "\n" for sidecar in sidecars for clip in sidecar["quarantined"]]
        totals: dict[str, Any] = {key: sum(sidecar[key] for sidecar in sidecars) for key in COUNTS}
        totals["hours"] = totals["samples"] / rate / 3600
        totals["quarantined"] = len(quarantined)
        totals["shards"] = [{"rows": sidecar["rows"], "sha256": sidecar["sha256"]} for sidecar in sidecars]
        for name, content in ((QUARANTINE, "".join(quarantined)), (SUCCESS, json.dumps(totals, indent=1))):
            if self.read(name) != content.encode():
                self.write(name, content.encode())
        return totals


def shard_name(shard: int, shards: int) -> str:
    """Return the file name of a shard."""
    return f"tokens-{shard:05}-of-{shards:05}.parquet"


def _sidecar_name(shard: int) -> str:
    return f"_snax/{shard:05}.json"


def _is_sidecar(content: dict[str, Any]) -> bool:
    """Return whether all fields of a sidecar are present and have the right types."""
    counts = [content.get(name) for name in (*COUNTS, "attempt")]
    counted = all(isinstance(count, int) and 0 <= count < 2**63 for count in counts)
    return counted and isinstance(content.get("quarantined"), list) and isinstance(content.get("sha256"), str)


def _parse_object(content: bytes | None) -> dict[str, Any] | None:
    """Parse a JSON object. Returns None for missing or corrupt content."""
    try:
        value = json_text.parse(content or b"")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
