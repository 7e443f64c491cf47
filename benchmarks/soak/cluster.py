"""Extract shards on Ray clusters. At random times, workers, nodes and drivers are killed, clusters stop and nodes join.

In every round, the shards must be those of one process, and no worker or decoder may be left. The model is small, so
that there are many rounds.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from helpers import corpora, jobs, small
from ray.cluster_utils import Cluster

import snax

MAX_NODES = 4
# In the first `DISTURBED_S` of a round, something is killed or added every `PAUSE_S` on average. Then it must end.
PAUSE_S, DISTURBED_S, TIMEOUT_S = 6, 240, 900
# How often each happens.
ACTIONS = {"worker killed": 4, "node killed": 2, "node joined": 4, "driver killed": 1, "cluster stopped": 1}


def cluster(seconds: float) -> dict[str, Any]:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "JAX_PLATFORMS": "cpu"}
    os.environ |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}  # 60 by default: the rounds would mostly wait
    rng, counts, begin = random.Random(0), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        snax.save(small.model(), folder / "model")
        for name in "abcd":
            corpora.mixed(folder / "corpus" / name)
        jobs.finish([jobs.run(command(folder, folder / "in process"))])
        expected = jobs.hashes(folder / "in process")
        while time.monotonic() < begin + seconds:
            round_counts = extract(folder, rng)
            counts += round_counts + Counter(rounds=1)
            assert jobs.hashes(folder / "out") == expected
            print(dict(round_counts), flush=True)
            shutil.rmtree(folder / "out")
    return {"hours": round((time.monotonic() - begin) / 3600, 2), **counts}


def command(folder: Path, out: Path, **options: Any) -> list[str]:
    return jobs.command([folder / "corpus"], out, folder / "model", clips_per_shard=4, num_decoders=1, **options)


def extract(folder: Path, rng: random.Random) -> Counter[str]:
    """Extract a corpus to the end. Returns what happened meanwhile."""
    counts, start = Counter[str](), time.monotonic()
    nodes, process = start_nodes(), None
    while True:
        elapsed = time.monotonic() - start
        assert elapsed < TIMEOUT_S, "the extraction does not end"
        if process is None:
            options = {"workers": MAX_NODES, "worker_cpus": 1, "ray_address": nodes.address}
            process = jobs.run(command(folder, folder / "out", **options))
            counts["drivers"] += 1
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.expovariate(1 / PAUSE_S))
            if process.returncode == 0:
                break
            process = None  # it ended with an error or was killed: the same command resumes
            continue
        if elapsed > DISTURBED_S:
            continue
        (action,) = rng.choices(list(ACTIONS), list(ACTIONS.values()))
        workers, others = jobs.ray_workers(), list(nodes.worker_nodes)
        if action == "worker killed" and workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
        elif action == "node killed" and len(others) > 1:
            nodes.remove_node(rng.choice(others), allow_graceful=False)
        elif action == "node joined" and len(others) < MAX_NODES:
            nodes.add_node(num_cpus=1)
        elif action == "driver killed":
            process.kill()
        elif action == "cluster stopped":
            nodes.shutdown()
            process.communicate(timeout=TIMEOUT_S)
            wait_until_gone()
            nodes, process = start_nodes(), None
        else:
            continue
        counts[action] += 1
        print(f"{time.strftime('%H:%M:%S')} {action}, {jobs.committed(folder / 'out')} shards", flush=True)
    wait_until_gone()
    nodes.shutdown()
    return counts


def start_nodes() -> Cluster:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    return nodes


def wait_until_gone() -> None:
    deadline = time.monotonic() + 60
    while jobs.ray_processes():
        assert time.monotonic() < deadline, "a worker or decoder is left"
        time.sleep(0.1)
