"""A pod in miniature: `python examples/pod.py`.

Two processes, as on two hosts of a pod, make shards of a corpus together. Both are killed half way, as by preemption,
and the same command goes on. What comes out is what one process makes that nobody kills.
"""

import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile

from demo import CLIP


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        corpus, tokens, alone = (Path(name, part) for part in ("corpus", "tokens", "alone"))
        write(corpus)

        hosts = start(corpus, tokens, 2)
        while not shards(tokens) and all(host.poll() is None for host in hosts):
            time.sleep(0.01)
        for host in hosts:
            host.kill()
        for host in hosts:
            host.wait()
        print(f"killed: {len(shards(tokens))} of 20 shards are there, whole")

        finish(start(corpus, tokens, 2))
        print(f"the same command went on: {len(shards(tokens))} of 20 shards")

        finish(start(corpus, alone, 1))
        same = shards(tokens) == shards(alone)
        print("one process that nobody killed made", "the same bytes" if same else "OTHER BYTES")


def write(corpus: Path) -> None:
    """200 clips of two seconds, out of the bundled one."""
    audio, rate = soundfile.read(CLIP)
    corpus.mkdir()
    for i in range(200):
        begin = i * len(audio) // 400
        soundfile.write(corpus / f"{i:03}.flac", audio[begin : begin + 2 * rate], rate)


def start(corpus: Path, out: Path, count: int) -> list["subprocess.Popen[bytes]"]:
    """`snax extract` on so many hosts. On a pod, or under Slurm, they find each other, and the command ends at `-m`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    line = [sys.executable, "-m", "snax.cli", "extract", str(corpus), "-o", str(out), "-m", "mini_16khz"]
    line += ["--clips-per-shard=10", "--num-workers=1"]
    told = [[f"--coordinator={address}", f"--num-processes={count}", f"--process-id={i}"] for i in range(count)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # several processes can't share one accelerator
    return [subprocess.Popen(line + (each if count > 1 else []), env=environment) for each in told]


def finish(hosts: list["subprocess.Popen[bytes]"]) -> None:
    """Waits for hosts that are to succeed."""
    for host in hosts:
        if host.wait():
            raise SystemExit(f"a host failed: {host.returncode}")


def shards(out: Path) -> dict[str, str]:
    """Their names and hashes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("tokens-*.parquet")}


if __name__ == "__main__":
    main()
