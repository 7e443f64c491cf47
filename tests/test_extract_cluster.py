"""`snax extract` on real Ray clusters of several nodes on this machine. Nodes, workers, driver and head are killed."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers import corpora, jobs, small
from helpers.jobs import committed, finish, hashes, ray_processes, ray_workers
from ray.cluster_utils import Cluster

import snax
from snax.extract import cluster as driver
from snax.extract.config import ExtractConfig, RayOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_ray_cluster"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a corpus."""
    folder = tmp_path_factory.mktemp("cluster")
    snax.save(small.model(), folder / "model")
    corpora.mixed(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def in_process(folder: Path) -> dict[str, str]:
    finish([jobs.run(command(folder, folder / "in process"))])
    return hashes(folder / "in process")


@pytest.fixture
def cluster(one_ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster whose head has no cores."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()
    wait_until(lambda: not ray_processes(), "a worker or decoder is still running")


def command(folder: Path, out: Path, **options: Any) -> list[str]:
    return jobs.command([folder / "corpus"], out, folder / "model", clips_per_shard=4, num_decoders=1, **options)


def start(folder: Path, out: Path, cluster: Cluster, workers: int) -> "subprocess.Popen[str]":
    """Start the driver. It would fail if it used a device."""
    line = command(folder, out, workers=workers, ray_address=cluster.address, worker_cpus=1)
    return jobs.run(line, JAX_PLATFORMS="none")


def wait_until(condition: Any, message: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.05)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_equal_those_of_one_process(
    count: int, folder: Path, in_process: dict[str, str], tmp_path: Path, cluster: Cluster
) -> None:
    for _ in range(count):
        cluster.add_node(num_cpus=1)
    (err,) = finish([start(folder, tmp_path / "out", cluster, count)])
    assert "133 clips: 132 in 34 shard(s) of" in err
    assert "1 in quarantine" in err
    assert hashes(tmp_path / "out") == in_process


def test_workers_and_nodes_come_and_go(
    folder: Path, in_process: dict[str, str], tmp_path: Path, cluster: Cluster
) -> None:
    """One worker is killed, then a node; a node joins. The run goes on, and every shard is that of one process."""
    out, rng = tmp_path / "out", random.Random(0)
    cluster.add_node(num_cpus=1)
    lost_node = cluster.add_node(num_cpus=1)
    process = start(folder, out, cluster, 3)
    wait_until(lambda: committed(out) > 2, "nothing was committed")
    os.kill(rng.choice(ray_workers()), signal.SIGKILL)
    wait_until(lambda: committed(out) > 6, "nothing was committed after a worker was killed")
    cluster.remove_node(lost_node, allow_graceful=False)
    cluster.add_node(num_cpus=1)
    assert process.poll() is None, "the run ended before the node was removed"
    (err,) = finish([process])
    assert "was lost and will be restarted" in err
    assert hashes(out) == in_process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_resumes_after_the_driver_is_stopped(
    number: signal.Signals, folder: Path, in_process: dict[str, str], tmp_path: Path, cluster: Cluster
) -> None:
    out = tmp_path / "out"
    cluster.add_node(num_cpus=2)
    process = start(folder, out, cluster, 2)
    wait_until(lambda: committed(out) > 2, "nothing was committed")
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == (75 if number == signal.SIGTERM else -number)
    wait_until(lambda: not ray_processes(), "a worker or decoder outlives the driver")
    assert committed(out) < corpora.MIXED_SHARDS
    finish([start(folder, out, cluster, 1)])  # the number of workers may change
    assert hashes(out) == in_process


def test_loses_nothing_when_the_head_is_killed(folder: Path, tmp_path: Path) -> None:
    """Driver and workers need some time to notice it, so they may end well. Otherwise the same command resumes."""
    uninterrupted, out = tmp_path / "uninterrupted", tmp_path / "out"

    def line(out: Path, **options: Any) -> list[str]:
        return jobs.command([folder / "corpus"], out, Path("mini_16khz"), clips_per_shard=4, num_decoders=1, **options)

    finish([jobs.run(line(uninterrupted))])
    process = jobs.run(line(out, workers=2))  # starts a cluster on this machine
    wait_until(lambda: committed(out) > 2, "nothing was committed")
    subprocess.run(["pkill", "-KILL", "-s", str(process.pid), "gcs_server|raylet"], check=True)
    process.communicate(timeout=120)
    wait_until(lambda: not ray_processes(), "a worker or decoder outlives the head")
    assert (process.returncode == 0) == (out / "_SUCCESS").exists()
    if process.returncode:
        finish([jobs.run(line(out, workers=2))])
    assert hashes(out) == hashes(uninterrupted)


def options(cluster: Cluster, workers: int) -> RayOptions:
    return RayOptions(workers=workers, ray_address=cluster.address, worker_cpus=1)


def config(folder: Path, out: Path) -> ExtractConfig:
    return ExtractConfig(
        [str(folder / "corpus")], out=str(out), model=str(folder / "model"), clips_per_shard=4, num_decoders=1
    )


def test_names_the_shard_that_kills_its_workers(
    folder: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(driver.ExtractWorker):
        def make(self, shard: int, attempt: int, seen: dict[str, int]) -> driver.Made:
            if shard == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().make(shard, attempt, seen)

    monkeypatch.setattr(driver, "ExtractWorker", Poisoned)
    cluster.add_node(num_cpus=2)
    with pytest.raises(driver.LostShardError, match="Shard 5 lost its worker 3 times"):
        driver.extract(config(folder, tmp_path / "out"), options(cluster, 2))


def test_a_clip_that_kills_its_decoder_goes_into_quarantine(
    folder: Path, in_process: dict[str, str], tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Abort:
        """Content that ends the process in which it is unpickled."""

        def __reduce__(self) -> Any:
            return os.abort, ()

    class WithPoison(driver.ExtractWorker):
        def start(self) -> dict[str, Any]:
            from snax.extract import worker

            original = worker.clips

            def clips(source: Any) -> Iterator[Any]:
                for clip, content in original(source):
                    yield clip, Abort() if clip.id == "001_float.wav" else content

            worker.clips = clips
            return super().start()

    monkeypatch.setattr(driver, "ExtractWorker", WithPoison)
    cluster.add_node(num_cpus=2)
    driver.extract(config(folder, tmp_path / "out"), options(cluster, 2))
    quarantined = [json.loads(line) for line in (tmp_path / "out" / "_quarantine.jsonl").read_text().splitlines()]
    reasons = {clip["id"]: clip["reason"] for clip in quarantined}
    assert reasons["001_float.wav"] == "the decoder process crashed (SIGABRT)."
    assert len(reasons) == 2
    shards = hashes(tmp_path / "out")
    assert sum(shards[name] != in_process[name] for name in shards) == 1, "only the shard of that clip differs"


def test_resumes_after_full_disk(folder: Path, in_process: dict[str, str], tmp_path: Path) -> None:
    line = command(folder, Path("disk/out"), workers=1, worker_cpus=1)  # starts a cluster on this machine
    result = jobs.run_on_full_disk(line, tmp_path)
    assert result.stdout.split("\n")[:2] == ["exit code 2", "exit code 0"], result.stderr
    assert "No space left on device" in result.stderr
    assert hashes(tmp_path / "copy") == in_process


def test_resumes_after_the_store_has_failed(
    folder: Path, in_process: dict[str, str], tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every seventh write of a worker fails. A run stops with its error, and loses at most the shards in progress."""

    class Flaky(driver.ExtractWorker):
        def start(self) -> dict[str, Any]:
            from snax.extract.store import Store

            writes, original = itertools.count(1), Store.write

            def write(store: Store, name: str, content: bytes) -> None:
                if next(writes) % 7 == 0:
                    raise OSError("503 slow down")
                original(store, name, content)

            Store.write = write
            return super().start()

    monkeypatch.setattr(driver, "ExtractWorker", Flaky)
    cluster.add_node(num_cpus=2)
    runs, out = 0, tmp_path / "out"
    while not (out / "_SUCCESS").exists():
        before, runs = committed(out), runs + 1
        with contextlib.suppress(OSError):
            driver.extract(config(folder, out), options(cluster, 2))
        assert committed(out) > before
    assert runs > 2
    assert hashes(out) == in_process


def test_a_worker_takes_over_when_it_has_no_shards_of_its_own(
    folder: Path, in_process: dict[str, str], tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker is lost after the other has made all other shards, and does not come back."""
    out, lost = tmp_path / "out", tmp_path / "lost"

    class LostLate(driver.ExtractWorker):
        def start(self) -> dict[str, Any]:
            if lost.exists():
                time.sleep(3600)
            return super().start()

        def make(self, shard: int, attempt: int, seen: dict[str, int]) -> driver.Made:
            if ray.get_runtime_context().get_actor_name().endswith("-1"):
                while len(list(out.glob("_snax/0*.json"))) < 32:
                    time.sleep(0.1)
                time.sleep(1)
                lost.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().make(shard, attempt, seen)

    monkeypatch.setattr(driver, "ExtractWorker", LostLate)
    cluster.add_node(num_cpus=2)
    driver.extract(config(folder, out), options(cluster, 2))
    assert lost.exists()
    assert hashes(out) == in_process


def test_refuses_a_worker_whose_shards_would_differ(
    folder: Path,
    in_process: dict[str, str],
    tmp_path: Path,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Other(driver.ExtractWorker):
        def start(self) -> dict[str, Any]:
            description = super().start()
            if ray.get_runtime_context().get_actor_name().endswith("-1"):
                time.sleep(1)  # the first worker that starts decides
                return description | {"jaxlib": "0.0.1"}
            return description

    monkeypatch.setattr(driver, "ExtractWorker", Other)
    cluster.add_node(num_cpus=2)
    driver.extract(config(folder, tmp_path / "out"), options(cluster, 2))
    assert "-1 is not used, because its shards would differ: jaxlib '0.0.1' instead of" in caplog.text
    assert hashes(tmp_path / "out") == in_process


def test_refuses_a_second_driver(
    folder: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "NAME_TIMEOUT_S", 1)
    first = start(folder, tmp_path / "out", cluster, 1)  # waits for a node
    wait_until(lambda: first.poll() is not None or names(cluster), "no worker was requested")
    with pytest.raises(driver.ClusterError, match="Another extraction into .* runs on this Ray cluster"):
        driver.extract(config(folder, tmp_path / "out"), options(cluster, 1))
    first.kill()
    first.communicate()


def names(cluster: Cluster) -> list[str]:
    ray.init(address=cluster.address, namespace="snax")
    try:
        return [name for name in ray.util.list_named_actors() if name.startswith("snax-")]
    finally:
        ray.shutdown()


def test_stops_with_the_error_of_a_worker(folder: Path, tmp_path: Path, cluster: Cluster) -> None:
    cluster.add_node(num_cpus=1)
    missing = ExtractConfig([str(folder / "corpus")], out=str(tmp_path / "out"), model=str(folder / "missing"))
    with pytest.raises((ValueError, OSError), match="missing"):
        driver.extract(missing, options(cluster, 1))


def test_a_worker_isolates_the_tpu_chips_of_its_host(
    folder: Path, in_process: dict[str, str], tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TPUs only the variables can be checked, not their effect."""

    class Recorded(driver.ExtractWorker):
        def start(self) -> dict[str, Any]:
            description = super().start()
            (tmp_path / "environment.json").write_text(json.dumps(dict(os.environ)))
            return description

    monkeypatch.setattr(driver, "ExtractWorker", Recorded)
    cluster.add_node(num_cpus=1, resources={"TPU": 4})
    driver.extract(config(folder, tmp_path / "out"), options(cluster, 1))
    environment = json.loads((tmp_path / "environment.json").read_text())
    expected = {
        "CLOUD_TPU_TASK_ID": "0",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
        "TPU_VISIBLE_CHIPS": "0,1,2,3",
    }
    assert environment | expected == environment
    assert hashes(tmp_path / "out") == in_process


def test_workers_have_metrics(folder: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's dashboard and Prometheus read them from a port of each node."""

    class Reading(driver.ExtractWorker):
        def make(self, shard: int, attempt: int, seen: dict[str, int]) -> driver.Made:
            if shard == 20:
                text, deadline = "", time.monotonic() + 60
                while "snax_x_real_time{" not in text and time.monotonic() < deadline:
                    time.sleep(1)
                    ports = [node["MetricsExportPort"] for node in ray.nodes() if node["Resources"].get("CPU")]
                    text = urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}").read().decode()
                (tmp_path / "metrics.txt").write_text(text)
            return super().make(shard, attempt, seen)

    monkeypatch.setattr(driver, "ExtractWorker", Reading)
    cluster.add_node(num_cpus=1)
    driver.extract(config(folder, tmp_path / "out"), options(cluster, 1))
    lines = [line for line in (tmp_path / "metrics.txt").read_text().splitlines() if "ray_snax_" in line]
    values = {line.partition("{")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}
    assert 0 < values["ray_snax_clips_total"] <= 133
    assert 0 < values["ray_snax_hours_total"] < 1
    assert values["ray_snax_x_real_time"] > 0
    assert 'worker="snax-' in lines[-1]
