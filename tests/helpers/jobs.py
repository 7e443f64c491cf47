"""Run `snax extract` and `snax train` as real processes."""

import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def command(inputs: list[Path], out: Path, model: Path, **options: Any) -> list[str]:
    """Return a command line of `snax extract`."""
    line = [sys.executable, "-m", "snax.cli", "extract", *map(str, inputs), "-o", str(out), "-m", str(model)]
    return [*line, *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]


def run(line: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start one process in its own session."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def start(
    inputs: list[Path], out: Path, model: Path, processes: int = 1, devices: int = 1, **options: Any
) -> list[subprocess.Popen[str]]:
    """Start the processes of one extraction, each with `devices` CPU devices."""
    return launch(command(inputs, out, model, **options), processes, devices)


def launch(line: list[str], processes: int, devices: int, **environment: str) -> list[subprocess.Popen[str]]:
    """Start the processes of one distributed job, each with `devices` CPU devices."""
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        port = free_socket.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    cluster_options = [
        [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", f"--process-id={i}"]
        for i in range(processes)
    ]
    return [
        run(line + (options if processes > 1 else []), XLA_FLAGS=flags, **environment) for options in cluster_options
    ]


def finish(running: list[subprocess.Popen[str]]) -> list[str]:
    """Wait until all processes have succeeded, and return the standard error of each."""
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(errors)
    return errors


def hashes(out: Path) -> dict[str, str]:
    """Return the SHA-256 hash of each shard by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("tokens-*"))}
