"""Extract tokens with two processes that are preempted and restarted: `python examples/pod.py`.

Two processes, as on two hosts of a pod, extract the shards of a corpus. Both are killed halfway, as by preemption. The
same command then continues. The shards are byte for byte those of a single process without interruption.
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
        corpus, tokens, reference = (Path(name, part) for part in ("corpus", "tokens", "reference"))
        write_corpus(corpus)

        hosts = start(corpus, tokens, 2)
        while not shards(tokens) and all(host.poll() is None for host in hosts):
            time.sleep(0.01)
        for host in hosts:
            host.kill()
        for host in hosts:
            host.wait()
        print(f"killed: {len(shards(tokens))} of 20 shards are complete")

        finish(start(corpus, tokens, 2))
        print(f"restarted: {len(shards(tokens))} of 20 shards are complete")

        finish(start(corpus, reference, 1))
        same = shards(tokens) == shards(reference)
        print("shards of one uninterrupted process:", "the same bytes" if same else "DIFFERENT BYTES")


def write_corpus(corpus: Path) -> None:
    """Write 200 clips of two seconds, cut from the bundled clip."""
    audio, rate = soundfile.read(CLIP)
    corpus.mkdir()
    for i in range(200):
        offset = i * len(audio) // 400
        soundfile.write(corpus / f"{i:03}.flac", audio[offset : offset + 2 * rate], rate)


def start(corpus: Path, out: Path, count: int) -> list["subprocess.Popen[bytes]"]:
    """Start `snax extract` on `count` hosts.

    On a TPU pod or under Slurm the hosts find each other, and the cluster options below are not needed.
    """
    with socket.socket() as free_socket:
        free_socket.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free_socket.getsockname()[1]}"
    command = [sys.executable, "-m", "snax.cli", "extract", str(corpus), "-o", str(out), "-m", "mini_16khz"]
    command += ["--clips-per-shard=10", "--num-decoders=1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # several processes cannot share one accelerator
    hosts = []
    for i in range(count):
        cluster = [f"--coordinator={address}", f"--num-processes={count}", f"--process-id={i}"] if count > 1 else []
        hosts.append(subprocess.Popen(command + cluster, env=environment))
    return hosts


def finish(hosts: list["subprocess.Popen[bytes]"]) -> None:
    """Wait for the hosts. Exits if one fails."""
    for host in hosts:
        if host.wait():
            raise SystemExit(f"a host failed with exit status {host.returncode}")


def shards(out: Path) -> dict[str, str]:
    """Return the SHA-256 hash of each shard by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("tokens-*.parquet")}


if __name__ == "__main__":
    main()
