"""Real processes of `snax extract`: several with the environment of a Slurm job, killed, stopped, or on a full disk.

All make the same shards.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import corpora, jobs, small
from helpers.jobs import finish, hashes

import snax


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a corpus."""
    folder = tmp_path_factory.mktemp("extract")
    snax.save(small.model(), folder / "model")
    corpora.mixed(folder / "corpus")
    return folder


def start(folder: Path, out: Path, processes: int = 1, devices: int = 1) -> list[subprocess.Popen[str]]:
    return jobs.start([folder / "corpus"], out, folder / "model", processes, devices, clips_per_shard=4, num_decoders=2)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, str]:
    (err,) = finish(start(folder, folder / "uninterrupted"))
    assert "133 clips: 132 in 34 shard(s) of" in err
    assert "1 in quarantine" in err
    return hashes(folder / "uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (2, 3), (3, 1)])
def test_shards_do_not_depend_on_processes_and_devices(
    processes: int, devices: int, folder: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    errors = finish(start(folder, tmp_path / "out", processes, devices))
    assert "133 clips: 132 in 34 shard(s) of" in errors[0]
    assert errors[1:] == [""] * (processes - 1), "only process 0 writes to standard error"
    assert hashes(tmp_path / "out") == uninterrupted


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="`taskset` sets the cores of a process on Linux only")
def test_shards_do_not_depend_on_cores(folder: Path, tmp_path: Path) -> None:
    """The bundled model has wide layers. Eigen's products of such layers depend on the number of threads."""
    for name, cores in (("one", "0"), ("all", ",".join(map(str, os.sched_getaffinity(0))))):
        line = jobs.command([folder / "corpus"], tmp_path / name, Path("mini_16khz"), clips_per_shard=4, num_decoders=1)
        finish([jobs.run(["taskset", "-c", cores, *line])])
    assert hashes(tmp_path / "one") == hashes(tmp_path / "all")


def committed(out: Path) -> int:
    """Return the number of committed shards."""
    return len(list(out.glob("_snax/0*.json")))


def running_in_session(leader: int) -> Iterator[int]:
    """Yield the ids of the running processes in a session. The decoders of a process are in its session."""
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
    """Wait until the processes and their decoders have ended."""
    deadline = time.monotonic() + 20
    while remaining := [pid for process in running for pid in running_in_session(process.pid)]:
        assert time.monotonic() < deadline, f"processes {remaining} are still running"
        time.sleep(0.1)


def kill(running: list[subprocess.Popen[str]]) -> None:
    for process in running:
        process.kill()
    for process in running:
        process.communicate()


@pytest.mark.slow
def test_resumes_after_kill_with_any_number_of_processes(
    folder: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    rng = random.Random(0)
    out, counts = tmp_path / "out", []
    for processes, new_shards in ((1, 0), (3, 2), (2, 1), (1, 4), (2, 1)):
        running = start(folder, out, processes)
        # Most of the time goes into starting, so wait for shards before the kill.
        target = committed(out) + new_shards
        while committed(out) < target:
            assert all(process.poll() is None for process in running), "the processes ended before they were killed"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1 if new_shards else 2))
        kill(running)
        assert_all_gone(running)
        counts.append(committed(out))
    assert 0 < counts[-1] < corpora.MIXED_SHARDS, f"the kills came too early or too late for the test: {counts} shards"
    assert not (out / "_SUCCESS").exists()
    finish(start(folder, out, 2))
    assert hashes(out) == uninterrupted
    assert not list(out.rglob(".snax-*"))


def test_resumes_after_one_of_two_processes_is_killed(
    folder: Path, uninterrupted: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, second = running = start(folder, out, 2)
    while committed(out) < 4:
        time.sleep(0.01)
    first.kill()  # it runs the coordinator
    assert second.wait(timeout=60) != 0, "a process must fail when another has died"
    kill(running)
    assert_all_gone(running)
    assert 4 <= committed(out) < corpora.MIXED_SHARDS
    finish(start(folder, out, 2))
    assert hashes(out) == uninterrupted


def catches(pid: int, number: int) -> bool:
    """Return whether a process handles a signal. It does not while it is still importing."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [0, 3])
def test_resumes_after_sigterm(shards: int, folder: Path, uninterrupted: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    (process,) = running = start(folder, out)
    while committed(out) < shards:
        time.sleep(0.01)
    while process.poll() is None and not catches(process.pid, signal.SIGTERM):
        time.sleep(0.01)
    while process.poll() is None and not (out / "_snax" / "plan.parquet").exists():
        time.sleep(0.01)  # with `shards` = 0, the signal arrives between the plan and the compilation
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 75
    assert "stopped by SIGTERM. Run the same command again to resume" in err
    assert_all_gone(running)
    finish(start(folder, out))
    assert hashes(out) == uninterrupted


@pytest.mark.slow
def test_resumes_after_full_disk(folder: Path, uninterrupted: dict[str, str], tmp_path: Path) -> None:
    """The output is on a tmpfs of 60 kB, which is enlarged for the second run."""
    line = jobs.command([folder / "corpus"], Path("disk/out"), folder / "model", clips_per_shard=4)
    result = jobs.run_on_full_disk(line, tmp_path)
    assert result.stdout.split("\n")[:2] == ["exit code 2", "exit code 0"], result.stderr
    assert "No space left on device" in result.stderr
    assert hashes(tmp_path / "copy") == uninterrupted
