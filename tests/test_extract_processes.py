"""`snax extract` as real processes: several of them, killed, stopped, and out of disk. The shards stay the same."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import corpora, jobs, small
from helpers.jobs import finish, hashes

import snax

SHARDS = 34  # of four clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a corpus: 121 files, a table of six rows and a tar."""
    folder = tmp_path_factory.mktemp("extract")
    snax.save(small.model(), folder / "model")
    clips = corpora.clips(120, seed=1)
    clips["bad.wav"] = b"bad"
    corpora.folder(folder / "corpus", clips)
    corpora.table(folder / "corpus" / "a.parquet", corpora.clips(6, seed=2))
    corpora.tar(folder / "corpus" / "a.tar", corpora.clips(6, seed=3))
    return folder


def start(folder: Path, out: Path, processes: int = 1, devices: int = 1) -> list[subprocess.Popen[str]]:
    return jobs.start([folder / "corpus"], out, folder / "model", processes, devices, clips_per_shard=4, num_workers=2)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, str]:
    (said,) = finish(start(folder, folder / "undisturbed"))
    assert "133 clips: 132 in 34 shard(s) of" in said
    assert "1 that could not be read" in said
    return hashes(folder / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 3), (3, 1)])
def test_processes_and_devices_do_not_matter(
    processes: int, devices: int, folder: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    said = finish(start(folder, tmp_path / "out", processes, devices))
    assert "133 clips: 132 in 34 shard(s) of" in said[0]
    assert said[1:] == [""] * (processes - 1), "process 0 speaks for all"
    assert hashes(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_processes_find_each_other_under_slurm(folder: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """By what Slurm sets in their environments."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    command = jobs.command([folder / "corpus"], tmp_path / "out", folder / "model", clips_per_shard=4)
    running = [jobs.run(command, **job, SLURM_NTASKS="2", SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    first, second = finish(running)
    assert "133 clips: 132 in 34 shard(s) of" in first
    assert second == "", "it is a part of the first one's job"
    assert hashes(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("missing", ["coordinator", "num_processes", "process_id"])
def test_half_of_a_cluster_is_refused(missing: str, folder: Path, tmp_path: Path) -> None:
    told = {"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 1}
    del told[missing]
    process = jobs.run(jobs.command([folder / "corpus"], tmp_path / "out", folder / "model", **told))
    _, said = process.communicate()
    assert process.returncode == 2
    assert "be defined. Give all of --coordinator, --num-processes and --process-id, or none." in said
    assert not (tmp_path / "out").exists()


def committed(out: Path) -> int:
    return len(list(out.glob("_snax/0*.json")))


def of_session(leader: int) -> Iterator[int]:
    """The processes that one has started, decoders too."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            state, _, _, session = stat.rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                yield int(entry.name)


def assert_all_gone(running: list[subprocess.Popen[str]]) -> None:
    """The decoders of processes that are no more end too."""
    deadline = time.monotonic() + 20
    while left := [pid for process in running for pid in of_session(process.pid)]:
        assert time.monotonic() < deadline, f"{left} are left behind"
        time.sleep(0.1)


def kill(running: list[subprocess.Popen[str]]) -> None:
    for process in running:
        process.kill()
    for process in running:
        process.communicate()


@pytest.mark.slow
def test_kill_at_any_time_with_any_number_of_processes(
    folder: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    chance = random.Random(0)
    out, done = tmp_path / "out", []
    for processes, more in ((1, 0), (3, 2), (2, 1), (1, 4), (2, 1)):
        running = start(folder, out, processes)
        enough = committed(out) + more  # starting takes most of the time
        while committed(out) < enough:
            assert all(process.poll() is None for process in running), "they were to be killed first"
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.1 if more else 2))
        kill(running)
        assert_all_gone(running)
        done.append(committed(out))
    assert 0 < done[-1] < SHARDS, f"killed too late or too early to show anything: {done}"
    assert not (out / "_SUCCESS").exists()
    finish(start(folder, out, 2))
    assert hashes(out) == undisturbed
    assert not list(out.rglob(".snax-*"))


def test_one_of_two_processes_is_killed(folder: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = running = start(folder, out, 2)
    while committed(out) < 4:
        time.sleep(0.01)
    first.kill()  # the one that the others hear from
    assert second.wait(timeout=60) != 0, "a part of the job is not the job"
    kill(running)
    assert_all_gone(running)
    assert 4 <= committed(out) < SHARDS
    finish(start(folder, out, 2))
    assert hashes(out) == undisturbed


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: before it has, it is still importing."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [0, 3])
def test_sigterm(shards: int, folder: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (process,) = running = start(folder, out)
    while committed(out) < shards:
        time.sleep(0.01)
    while process.poll() is None and not catches(process.pid, signal.SIGTERM):
        time.sleep(0.01)
    while process.poll() is None and not (out / "_snax" / "plan.parquet").exists():
        time.sleep(0.01)  # without a shard to wait for: until the plan is there, before it compiles
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 75
    assert "stopped by SIGTERM; the same command again goes on from here" in said
    assert_all_gone(running)
    finish(start(folder, out))
    assert hashes(out) == undisturbed


@pytest.mark.slow
def test_a_full_disk(folder: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """A real one, of 60 kB, that is then made larger."""
    python = (
        f"{sys.executable} -m snax.cli extract {folder / 'corpus'} -o out/put -m {folder / 'model'} --clips-per-shard 4"
    )
    script = f"""
        mkdir out copy && mount -t tmpfs -o size=60k none out || exit 99
        {python}; echo exit code $?
        mount -o remount,size=10m out
        {python}; echo exit code $?
        cp out/put/tokens-* copy
    """
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if ran.returncode == 99 or "unshare failed" in ran.stderr:
        # Nothing but a real file system gets full, and in some containers none can be mounted.
        pytest.skip(f"no file system can be mounted here: {ran.stderr}")
    assert ran.stdout.split("\n")[:2] == ["exit code 2", "exit code 0"], ran.stderr
    assert "No space left on device" in ran.stderr
    assert hashes(tmp_path / "copy") == undisturbed
