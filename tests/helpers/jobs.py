"""Run `snax extract` and `snax train` as real processes."""

import contextlib
import hashlib
import os
import random
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


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
    """Start the processes of one extraction, each with `devices` CPU devices, with the environment of a Slurm job."""
    line, flags = command(inputs, out, model, **options), f"--xla_force_host_platform_device_count={devices}"
    if processes == 1:
        return [run(line, XLA_FLAGS=flags)]
    # JAX derives the coordinator's port from the job id: https://github.com/jax-ml/jax/tree/main/jax/_src/clusters
    slurm = {"SLURM_JOB_ID": str(_free_port(65536 - 4096) - (65536 - 4096)), "SLURM_STEP_NODELIST": "localhost"}
    slurm |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": str(processes)}
    return [run(line, XLA_FLAGS=flags, **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(processes)]


def launch(line: list[str], processes: int, devices: int, **environment: str) -> list[subprocess.Popen[str]]:
    """Start the processes of one distributed job with cluster options, each with `devices` CPU devices."""
    port, flags = _free_port(1024), f"--xla_force_host_platform_device_count={devices}"
    cluster_options = [
        [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}", f"--process-id={i}"]
        for i in range(processes)
    ]
    return [run(line + options, XLA_FLAGS=flags, **environment) for options in cluster_options]


def _free_port(low: int) -> int:
    """Return a free port from `low` on."""
    while True:
        port = random.randint(low, 65535)
        with socket.socket() as free_socket, contextlib.suppress(OSError):
            free_socket.bind(("127.0.0.1", port))
            return port


def finish(running: list[subprocess.Popen[str]]) -> list[str]:
    """Wait until all processes have succeeded, and return the standard error of each."""
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(errors)
    return errors


def run_on_full_disk(line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command twice that writes to disk/out, a tmpfs of 60 kB. The disk is enlarged for the second run.

    The shards are copied to the folder `copy`. Skips the test where a file system cannot be mounted.
    """
    command = shlex.join(line)
    script = f"""
        mkdir disk copy && mount -t tmpfs -o size=60k none disk || exit 99
        {command}; echo exit code $?
        mount -o remount,size=10m disk
        {command}; echo exit code $?
        cp disk/out/tokens-* copy
    """
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    result = subprocess.run(unshare, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode == 99 or "unshare failed" in result.stderr:
        # Only a real file system can be full, and some containers do not permit mounting one.
        pytest.skip(f"a file system cannot be mounted: {result.stderr}")
    return result


def hashes(out: Path) -> dict[str, str]:
    """Return the SHA-256 hash of each shard by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("tokens-*"))}


def committed(out: Path) -> int:
    """Return the number of shards that an extraction has committed."""
    return len(list(out.glob("_snax/0*.json")))


def ray_processes() -> list[int]:
    """Return the processes of all Ray workers of extractions, and of their decoders."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if b"RAY_RAYLET_PID=" in environment and (b"ray::ExtractWorker" in line or b"snax.data.decoding" in line):
            pids.append(int(entry.name))
    return pids


def ray_workers() -> list[int]:
    """Return the processes of all Ray workers of extractions."""
    return [pid for pid in ray_processes() if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()]
