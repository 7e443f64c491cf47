"""Training runs in real processes, which are killed and resumed, and the use of their results."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import snac
import soundfile
from filelock import FileLock
from helpers import jobs, recordings, reference, small

import snax
from snax.train import config as train_config
from snax.train import data, run
from snax.weights import torch_files

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_mixes")]
RECIPES = Path(__file__).parents[1] / "recipes"


# Uses every feature of training except spectra, which take most of the compilation time.
CONFIG = """
steps = 12
log_every = 2
eval_every = 6
checkpoint_every = 2
dead_code_threshold = 0.2
[model]
sampling_rate = 16000
encoder_dim = 8
encoder_rates = [4]
decoder_dim = 16
decoder_rates = [4]
codebook_size = 64
vq_strides = [4, 2, 1]
[data]
inputs = ["INPUTS"]
held_out = ["HELD_OUT"]
crop_seconds = 0.2
batch = 4
[optimizer]
learning_rate = 1e-3
[losses]
mel = 0
waveform = 10
[discriminators]
start_step = 9
periods = [2]
period_widths = [4, 8]
fft_sizes = []
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of pytest-xdist share, so that only one of them makes the slow fixtures."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "training_runs"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def config_path(shared: Path) -> Path:
    """Write a configuration and its audio."""
    clips, path = shared / "config" / "clips", shared / "config" / "config.toml"
    with FileLock(shared / "config.lock"):
        if not path.exists():
            clips.mkdir(parents=True)
            samples, rate = soundfile.read(recordings.DATA / "speech_7s.wav", dtype="float32")
            for i in range(40):
                soundfile.write(clips / f"{i:02}.wav", samples[i * 2000 : i * 2000 + 20_000], rate)
            content = CONFIG.replace("INPUTS", str(clips)).replace("HELD_OUT", str(recordings.DATA / "speech_3s.wav"))
            path.write_text(content)
    return path


def start(config: Path, out: Path, processes: int = 2) -> list[subprocess.Popen[str]]:
    """Start a run on four devices, which are divided among the processes. All runs share a compilation cache."""
    line = [sys.executable, "-m", "snax.cli", "train", str(config), "-o", str(out)]
    cache = str(config.parent / "compiled")
    if processes == 1:
        flags = "--xla_force_host_platform_device_count=4"
        return [jobs.run(line, XLA_FLAGS=flags, JAX_COMPILATION_CACHE_DIR=cache)]
    return jobs.launch(line, processes, 4 // processes, JAX_COMPILATION_CACHE_DIR=cache)


@pytest.mark.parametrize("missing", ["coordinator", "num-processes", "process-id"])
def test_rejects_incomplete_cluster_options(missing: str, config_path: Path, tmp_path: Path) -> None:
    options = {"coordinator": "127.0.0.1:1", "num-processes": "2", "process-id": "1"}
    del options[missing]
    line = [sys.executable, "-m", "snax.cli", "train", str(config_path), "-o", str(tmp_path / "out")]
    process = jobs.run([*line, *(f"--{name}={value}" for name, value in options.items())])
    _, err = process.communicate()
    assert process.returncode == 2
    assert "be defined. Set all of --coordinator, --num-processes and --process-id, or none." in err
    assert not (tmp_path / "out").exists()


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit())


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the records of the log without speeds."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_second"} for line in lines]


def run_killed_and_resumed(config_path: Path, out: Path) -> None:
    """Kill all processes of a run after a checkpoint, and resume the run."""
    running = start(config_path, out)
    while all(process.poll() is None for process in running) and not checkpoints(out):
        time.sleep(0.01)
    for process in running:
        with contextlib.suppress(ProcessLookupError):  # it has exited with an error, which the next assertion shows
            os.killpg(process.pid, signal.SIGKILL)
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [-signal.SIGKILL] * 2, "\n".join(errors)
    assert checkpoints(out), "the run was killed before its first checkpoint"
    assert checkpoints(out)[-1] < 12, "the run was complete before it was killed"
    jobs.finish(start(config_path, out))


@pytest.fixture(scope="module")
def resumed_run(config_path: Path, shared: Path) -> Path:
    """Return the folder of a run that was killed after a checkpoint and resumed."""
    out = shared / "resumed"
    with FileLock(shared / "resumed.lock"):
        if not (out / "models" / "12").exists():
            run_killed_and_resumed(config_path, out)
    return out


def test_resumed_run_equals_uninterrupted_run(config_path: Path, resumed_run: Path, tmp_path: Path) -> None:
    """Parameters are equal bit for bit, and the logs are equal except for speeds."""
    uninterrupted = tmp_path / "uninterrupted"
    jobs.finish(start(config_path, uninterrupted))
    assert_same_weights(resumed_run / "models" / "12", uninterrupted / "models" / "12")
    records = read_log(resumed_run)
    assert records == read_log(uninterrupted)
    train_records = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train_records] == [2, 4, 6, 8, 10, 12]
    assert [record["step"] for record in records if record["kind"] == "held_out"] == [6, 12]
    # The ninth step is the last one without discriminators.
    assert [("adversarial" in record) for record in train_records] == [False] * 4 + [True] * 2
    assert checkpoints(resumed_run) == [10, 12]
    assert list((resumed_run / "tensorboard").glob("events*"))


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_loses_no_step(processes: int, config_path: Path, tmp_path: Path) -> None:
    """After SIGTERM to one process, all save the same step and exit. The resumed run equals an uninterrupted one."""
    text = config_path.read_text().replace("log_every = 2", "log_every = 1")
    text = text.replace("eval_every = 6", "eval_every = 100000").replace(
        "checkpoint_every = 2", "checkpoint_every = 100000"
    )

    def configure(steps: int) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text.replace("steps = 12", f"steps = {steps}"))
        return path

    out, uninterrupted = tmp_path / "out", tmp_path / "uninterrupted"
    running = start(configure(100_000), out, processes)
    while all(process.poll() is None for process in running) and last_step(out) < 12:
        time.sleep(0.01)
    running[-1].send_signal(signal.SIGTERM)
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [os.EX_TEMPFAIL] * processes, "\n".join(errors)
    step = last_step(out)
    for error in errors:
        assert f"stopped by SIGTERM after step {step}. Run the same command again to resume." in error
    assert checkpoints(out) == [9, step], "the ninth step precedes the compilation of the discriminators"

    config = configure(step + 2)
    for folder in (out, uninterrupted):
        jobs.finish(start(config, folder, processes))
    assert_same_weights(out / "models" / str(step + 2), uninterrupted / "models" / str(step + 2))


def last_step(out: Path) -> int:
    path = out / "log.jsonl"
    return read_log(out)[-1]["step"] if path.exists() and path.read_text().endswith("\n") else 0


def assert_same_weights(path: Path, expected_path: Path) -> None:
    for parameter, expected in zip(
        jax.tree.leaves(snax.load(path)), jax.tree.leaves(snax.load(expected_path)), strict=True
    ):
        np.testing.assert_array_equal(parameter, expected)


# The second process compiles for longer than the deadline of collectives, after which the first would fail.
UNEQUAL_COMPILATION = """
import sys, time
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from snax import distributed, signals
from snax.train import run

coordinator, processes, process = (option.partition("=")[2] for option in sys.argv[1:])
distributed.join(coordinator, int(processes), int(process))

def total(x):
    time.sleep(40 * jax.process_index())
    return x.sum()

with signals.exit_on_error():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.make_array_from_process_local_data(sharding, np.ones(3, np.float32))
    program = jax.jit(total, out_shardings=NamedSharding(mesh, PartitionSpec()))
    assert run._compile(program, x)(x) == 6
"""


def test_processes_wait_for_slow_compilation() -> None:
    jobs.finish(jobs.launch([sys.executable, "-c", UNEQUAL_COMPILATION], 2, 1))


def test_curves(resumed_run: Path, tmp_path: Path) -> None:
    log = resumed_run / "log.jsonl"
    subprocess.run([sys.executable, RECIPES / "curves.py", log, log, tmp_path / "curves.png"], check=True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_trained_model_converts_to_torch(resumed_run: Path, tmp_path: Path) -> None:
    """The reference gives the same codes and the same audio with the trained weights."""
    model = snax.load(resumed_run / "models" / "12")
    torch_files.write_folder(model, tmp_path / "torch")
    torch_model = snac.SNAC.from_pretrained(str(tmp_path / "torch"))
    reference.assert_same(torch_model.eval(), model, recordings.clip("speech_7s.wav", 16_000, 2))


def test_extended_run_equals_a_longer_one(config_path: Path, tmp_path: Path) -> None:
    """A finished run goes on with more steps and other intervals. Weights are bit for bit those of a single run."""
    config = dataclasses.replace(train_config.read(config_path), steps=2, discriminators=None)
    run.train(config, tmp_path / "extended", None, 1)
    longer = dataclasses.replace(config, steps=4, log_every=1, eval_every=3, checkpoint_every=3)
    extended = run.train(longer, tmp_path / "extended", None, 1)
    single = run.train(dataclasses.replace(config, steps=4), tmp_path / "single", None, 1)
    assert_same_weights(extended, single)
    assert json.loads((tmp_path / "extended" / "config.json").read_text())["steps"] == 4
    with pytest.raises(train_config.ConfigError, match=r"`steps` \(=3\) must be at least 4, the steps that the run in"):
        run.train(dataclasses.replace(longer, steps=3), tmp_path / "extended", None, 1)


def test_rejects_other_config_and_foreign_folder(config_path: Path, resumed_run: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.toml"
    changed.write_text(config_path.read_text().replace("batch = 4", "batch = 8"))
    with pytest.raises(train_config.ConfigError, match="another configuration: `data.batch` was 4, now 8"):
        run.train(train_config.read(changed), resumed_run, None, 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(train_config.ConfigError, match="is not empty and does not contain a run: it has mine.txt"):
        run.train(train_config.read(config_path), tmp_path / "full", None, 1)
    config = train_config.read(config_path)
    for source, model, given in ((None, None, "neither"), ("snac_24khz", small.CONFIG, "both")):
        with pytest.raises(train_config.ConfigError, match=f"exactly one of .* is required, but {given} was given"):
            run.train(dataclasses.replace(config, model=model), tmp_path / str(source), source, 1)


def test_unknown_model_creates_no_folder(config_path: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(train_config.read(config_path), model=None)
    with pytest.raises(ValueError, match="neither a published model"):
        run.train(config, tmp_path / "run", "no/such/model", 1)
    assert not (tmp_path / "run").exists()


def test_rejects_indivisible_batch(config_path: Path, tmp_path: Path) -> None:
    config = train_config.read(config_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch=6))
    with pytest.raises(data.DataError, match=r"`data.batch` \(=6\) must be divisible by the number of devices \(=4\)"):
        run.train(config, tmp_path / "run", None, 1)


def test_init_from(config_path: Path, resumed_run: Path, tmp_path: Path) -> None:
    """Training starts from the weights of the given model. With a learning rate of almost 0, they do not change."""
    source = str(resumed_run / "models" / "12")
    config = train_config.read(config_path)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-30, weight_decay=0.0)
    config = dataclasses.replace(
        config, model=None, steps=2, eval_every=2, dead_code_threshold=0.0, optimizer=optimizer, discriminators=None
    )
    trained = snax.load(run.train(config, tmp_path / "run", source, 1))
    for parameter, expected in zip(jax.tree.leaves(trained), jax.tree.leaves(snax.load(source)), strict=True):
        np.testing.assert_allclose(parameter, expected, rtol=1e-5, atol=1e-8)  # weight norm rounds


def test_divergence_is_an_error(config_path: Path, tmp_path: Path) -> None:
    config = train_config.read(config_path)
    optimizer = dataclasses.replace(config.optimizer, learning_rate=1e9)
    config = dataclasses.replace(config, optimizer=optimizer, discriminators=None)
    with pytest.raises(run.DivergedError, match="these metrics are not finite: .*loss"):
        run.train(config, tmp_path / "run", None, 1)
