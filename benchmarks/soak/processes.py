"""Processes and their memory."""

from collections.abc import Iterator
from pathlib import Path


def session(leader: int) -> Iterator[int]:
    """Yield the processes of the leader's session: those that it started, and itself."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                yield int(entry.name)


def memory_mb(pids: list[int]) -> int:
    """Return the memory of processes in MB. Shared pages count once (proportional set size)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # the process has ended
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total // 1024
