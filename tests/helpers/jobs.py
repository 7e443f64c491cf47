"""`snax extract` and `snax train` as real processes."""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def command(inputs: list[Path], out: Path, model: Path, **options: Any) -> list[str]:
    """The command line."""
    line = [sys.executable, "-m", "snax.cli", "extract", *map(str, inputs), "-o", str(out), "-m", str(model)]
    return [*line, *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def run(line: list[str], **environment: str) -> subprocess.Popen[str]:
    """One process, in a session of its own."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def start(
    inputs: list[Path], out: Path, model: Path, processes: int = 1, devices: int = 1, **options: Any
) -> list[subprocess.Popen[str]]:
    """An extraction's processes, each with so many devices."""
    return together(command(inputs, out, model, **options), processes, devices)


def together(line: list[str], processes: int, devices: int, **environment: str) -> list[subprocess.Popen[str]]:
    """A job's processes, each with so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    several = [
        [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", f"--process-id={i}"]
        for i in range(processes)
    ]
    return [run(line + (each if processes > 1 else []), XLA_FLAGS=flags, **environment) for each in several]


def finish(running: list[subprocess.Popen[str]]) -> list[str]:
    """Waits for the job to succeed; what each process said."""
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(said)
    return said


def hashes(out: Path) -> dict[str, str]:
    """Of all shards."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("tokens-*"))}
