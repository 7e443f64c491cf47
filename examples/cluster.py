"""Extract tokens on a Ray cluster that loses a node: `python examples/cluster.py`.

Two nodes, which are processes on this machine, extract the shards of a corpus. One of them is killed, and another one
joins. The shards are byte for byte those of a single process. Needs the extra `cluster`.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soundfile
from ray.cluster_utils import Cluster

from demo import CLIP

CPU = {"JAX_PLATFORMS": "cpu"}  # several processes cannot share one accelerator


def main() -> None:
    os.environ.update(CPU, RAY_AUTH_MODE="disabled")
    with tempfile.TemporaryDirectory() as name:
        corpus, tokens, reference = (Path(name, part) for part in ("corpus", "tokens", "reference"))
        write_corpus(corpus)

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        node = cluster.add_node(num_cpus=1)
        run = subprocess.Popen([*command(corpus, tokens), "--workers=2", f"--ray-address={cluster.address}"])
        while len(shards(tokens)) < 4 and run.poll() is None:
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)
        print(f"killed a node: {len(shards(tokens))} of 20 shards are complete")
        cluster.add_node(num_cpus=1)
        if run.wait():
            raise SystemExit(f"the extraction failed with exit status {run.returncode}")
        cluster.shutdown()
        print(f"a node joined: {len(shards(tokens))} of 20 shards are complete")

        subprocess.run(command(corpus, reference), check=True)
        same = shards(tokens) == shards(reference)
        print("shards of one process:", "the same bytes" if same else "DIFFERENT BYTES")


def command(corpus: Path, out: Path) -> list[str]:
    line = [sys.executable, "-m", "snax.cli", "extract", str(corpus), "-o", str(out), "-m", "mini_16khz"]
    return [*line, "--clips-per-shard=10", "--num-decoders=1"]


def write_corpus(corpus: Path) -> None:
    """Write 200 clips of two seconds, cut from the bundled clip."""
    audio, rate = soundfile.read(CLIP)
    corpus.mkdir()
    for i in range(200):
        offset = i * len(audio) // 400
        soundfile.write(corpus / f"{i:03}.flac", audio[offset : offset + 2 * rate], rate)


def shards(out: Path) -> dict[str, str]:
    """Return the SHA-256 hash of each shard by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("tokens-*.parquet")}


if __name__ == "__main__":
    main()
