"""Training runs: their settings, their data, their steps beside torch's, and real processes that are really killed."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import audio
import jax
import jax.numpy as jnp
import jobs
import numpy as np
import pytest
import reference
import small
import snac
import soundfile
import torch
import torch_training
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import snax
from snax import torch_files
from snax.config import PUBLISHED_CONFIGS
from snax.train import data, run, settings
from snax.train.start import fit_quantizer
from snax.train.step import begin, step
from snax.train.weight_norm import fold

CONFIG = dataclasses.replace(small.CONFIG, noise=False)
TOLD = settings.Settings(
    steps=3,
    data=settings.Data(inputs=("-",), batch=4),
    model=CONFIG,
    # Larger than the codec's own, so that three steps show what is wrong.
    optimizer=settings.Optimizer(learning_rate=1e-3, decay=0.9, clip=10.0),
    # Not the STFT's: the gradient of single bins' logarithms is as large as a bin is small, and those are rounding.
    losses=settings.Losses(waveform=1.0),
    discriminators=settings.Discriminators(
        periods=(2, 5), windows=(512, 256), period_widths=(4, 8, 16), spectrum_width=4
    ),
)
# Where losses are not what is tested: those of spectra take most of a compilation.
PLAIN = dataclasses.replace(TOLD, losses=settings.Losses(mel=0.0, waveform=1.0))
SAMPLES = 4096
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(autouse=True)
def promotion() -> Iterator[None]:
    """Optax mixes counts and floats, which the rest of the tests forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def batches(count: int) -> list[np.ndarray]:
    """Of four stretches of speech and music each."""
    clips = np.concatenate([audio.clip(name, 16_000, 1.6)[0] for name in ("speech_7s.wav", "guit_em9.flac")])
    parts = clips[:, : 6 * SAMPLES].reshape(2, 6, SAMPLES).swapaxes(0, 1).reshape(-1, 4, 1, SAMPLES)
    return list(parts[:count])


def compiled(told: settings.Settings, *, judged: bool) -> Any:
    return jax.jit(functools.partial(step, settings=told, judged=judged))


@pytest.mark.parametrize("judged", [False, True])
def test_steps_cost_what_they_cost_in_torch(judged: bool) -> None:
    """Each step's losses depend on what the steps before it made of all parameters, discriminators' too."""
    model = small.model(CONFIG)
    state = begin(model, TOLD)
    assert state.judges is not None
    theirs = torch_training.Trainer(model, state.judges.networks if judged else None, TOLD)
    take = compiled(TOLD, judged=judged)
    for number, batch in enumerate(batches(3)):
        state, metrics = take(state, batch)
        for name, expected in theirs.step(torch.tensor(batch)).items():
            # Adam divides a gradient by its own size: float32's rounding moves parameters with next to none at all.
            assert float(metrics[name]) == pytest.approx(expected, rel=1e-5 if number == 0 else 1e-3), (number, name)
    assert int(state.step) == 3


def test_devices_share_a_step() -> None:
    """On four devices, each with a quarter of the batch, a step is that of one device."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    (batch,) = batches(1)
    state = begin(small.model(CONFIG), PLAIN)
    take = compiled(PLAIN, judged=True)
    alone, expected = take(state, batch)
    together, metrics = take(
        jax.device_put(state, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))),
    )
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-5), name  # sums in another order
    for ours, theirs in zip(jax.tree.leaves(together.usage), jax.tree.leaves(alone.usage), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_bfloat16_computes_in_it_and_keeps_float32() -> None:
    (batch,) = batches(1)
    state = begin(small.model(CONFIG), PLAIN)
    _, expected = compiled(PLAIN, judged=True)(state, batch)
    narrow = dataclasses.replace(PLAIN, dtype="bfloat16")
    after, metrics = compiled(narrow, judged=True)(state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if jnp.issubdtype(leaf.dtype, jnp.floating)} == {
        jnp.dtype("float32")
    }
    # Eight bits of mantissa, 0.4 %, through a dozen layers; and not the same, or nothing was narrow.
    assert float(metrics["feature"]) == pytest.approx(float(expected["feature"]), rel=0.03)
    assert float(metrics["feature"]) != float(expected["feature"])


def test_average_and_usage() -> None:
    """The average moves as a moving average does, quickly at first; each codebook's usage sums to its size."""
    told = dataclasses.replace(PLAIN, average=0.5)
    state = begin(small.model(CONFIG), told)
    take = compiled(told, judged=False)
    expected = np.asarray(state.average.encoder.conv_in.kernel[...])
    for number, batch in enumerate(batches(3)):
        state, _ = take(state, batch)
        decay = min(0.5, (1 + number) / (10 + number))
        now = np.asarray(fold(state.codec).encoder.conv_in.kernel[...])
        expected = decay * expected + (1 - decay) * now
        np.testing.assert_allclose(state.average.encoder.conv_in.kernel[...], expected, rtol=1e-5, atol=1e-7)
        for usage in state.usage:
            assert float(usage.sum()) == pytest.approx(CONFIG.codebook_size, rel=1e-4)


def test_unused_rows_are_restarted() -> None:
    """Rows that are never chosen become vectors of the batch, in the codec and in its average; others stay."""
    told = dataclasses.replace(PLAIN, restart=0.5)
    (batch,) = batches(1)
    model = small.model(CONFIG)
    state = begin(model, told)
    rows = np.arange(CONFIG.codebook_size) < 10
    state = state._replace(usage=tuple(jnp.where(rows, 0.0, 2.0) for _ in state.usage))
    after, _ = compiled(told, judged=False)(state, batch)
    kept, _ = compiled(PLAIN, judged=False)(state, batch)
    for i, (ours, plain) in enumerate(
        zip(after.codec.directions.quantizer.quantizers, kept.codec.directions.quantizer.quantizers, strict=True)
    ):
        changed = (ours.codebook[...] != plain.codebook[...]).any(axis=1)
        # Of the ten, one may have been chosen in this step, and so often that it is alive again.
        assert not changed[10:].any()
        assert changed[:10].sum() >= 5
        average = after.average.quantizer.quantizers[i].codebook[...]
        np.testing.assert_array_equal(average[changed], ours.codebook[...][changed])
        assert (after.usage[i][changed] == 1).all()


def test_a_quantizer_that_fits() -> None:
    """Where training from scratch begins, each level leaves less of the latents than it found, and uses its rows; as
    they are drawn, each leaves more."""
    (batch,) = batches(1)

    def left(model: snax.SNAC) -> list[float]:
        residual = latents = model.audio_to_latents(batch)
        left = []
        for level in model.quantizer.quantizers:
            residual = residual - level(residual)[0]
            left.append(float(jnp.square(residual).mean() / latents.var((0, 1)).mean()))
        return left

    drawn = snax.SNAC(dataclasses.replace(CONFIG, codebook_size=256), rngs=nnx.Rngs(0))
    fitted = jax.jit(fit_quantizer)(drawn, batch)
    assert left(drawn)[0] > 1
    assert 1 > left(fitted)[0] > left(fitted)[1] > left(fitted)[2]
    latents = fitted.audio_to_latents(batch)
    np.testing.assert_allclose(latents.mean((0, 1)), 0, atol=1e-4)  # float32, of a mean that was a thousand times this
    assert float(latents.std((0, 1)).mean()) == pytest.approx(1, abs=1e-4)
    for codes in fitted.encode(batch):
        assert len(np.unique(codes)) > 0.3 * min(256, codes.size)


MISTAKES: dict[str, tuple[str, str]] = {
    "no TOML": ("steps = = 3", "can't be read as TOML"),
    "nothing": ("", "`steps` is missing"),
    "unknown": ("steps = 3\nstep = 4\n[data]\ninputs = ['a']", "unknown: step; known are steps"),
    "unknown in a table": ("steps = 3\n[data]\ninput = ['a']", "unknown: data.input; known are inputs"),
    "no inputs": ("steps = 3\n[data]\ninputs = []", "`data.inputs` (=()) must be at least one"),
    "type": ("steps = '3'\n[data]\ninputs = ['a']", "`steps` (='3') must be int"),
    "bool": ("steps = true\n[data]\ninputs = ['a']", "`steps` (=True) must be int"),
    "not a table": ("steps = 3\ndata = 4", "`data` (=4) must be a table"),
    "pair": ("steps = 3\n[data]\ninputs = ['a']\nloudness = [1]", "`data.loudness` (=[1]) must be a list of 2 float"),
    "order": ("steps = 3\n[data]\ninputs = ['a']\nloudness = [-10, -20]", "a lower and a higher level"),
    "model": ("steps = 3\n[data]\ninputs = ['a']\n[model]\nencoder_dims = 3", "`model`: not the configuration"),
    "negative": ("steps = 3\n[data]\ninputs = ['a']\n[losses]\nmel = -1", "`losses.mel` (=-1.0) must be at least 0"),
    "dtype": ("steps = 3\ndtype = 'int8'\n[data]\ninputs = ['a']", "`dtype` (='int8') must be float32 or bfloat16"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistaken_settings(name: str, tmp_path: Path) -> None:
    content, message = MISTAKES[name]
    path = tmp_path / "settings.toml"
    path.write_text(content)
    with pytest.raises(settings.SettingsError) as caught:
        settings.read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    """They can be read; that of a published model has its architecture."""
    recipe = settings.read(path)
    assert recipe.model == PUBLISHED_CONFIGS.get(path.stem, recipe.model)
    assert (recipe.model is None) == (path.stem == "finetune")


def wavs(folder: Path, seconds: list[float]) -> Path:
    """Tones, each sample of which says of which clip it is: clip i has only values of about (i + 1) / 10."""
    folder.mkdir(exist_ok=True)
    for i, length in enumerate(seconds):
        sign = np.sign(np.sin(np.arange(round(length * 16_000)) + 0.5))
        soundfile.write(folder / f"{i}.wav", (i + 1) / 10 * sign, 16_000, subtype="FLOAT")
    return folder


def test_crops(tmp_path: Path) -> None:
    """Every stretch once an epoch, at the loudness that was drawn, short clips with silence behind; where iteration is
    taken up, the same crops come."""
    inputs = (str(wavs(tmp_path / "in", [0.05, 0.3, 1.0])),)
    stored = data.store(inputs, 16_000, tmp_path / "store", 1)
    assert stored.lengths.tolist() == [800, 4800, 16_000]
    np.testing.assert_allclose(stored.levels, 0, atol=1e-3)  # a square wave is as loud as its peak
    how = settings.Data(inputs=inputs, batch=4, loudness=(-30.0, -20.0))
    iterator = iter(data.crops(stored, 1600, how, seed=0))
    epoch = np.concatenate([next(iterator) for _ in range(7)])  # 2 epochs of 1 + 3 + 10 stretches
    assert epoch.shape == (28, 1, 1600)
    lengths = (epoch != 0).sum(axis=(1, 2))
    assert sorted(lengths.tolist()) == [800] * 2 + [1600] * 26
    levels = 20 * np.log10(np.abs(epoch).max(axis=(1, 2)))
    assert levels.min() > -30.01
    assert levels.max() < -19.99
    assert np.ptp(levels) > 5

    place, following = iterator.get_state(), [next(iterator) for _ in range(3)]
    again = iter(data.crops(stored, 1600, how, seed=0))
    again.set_state(json.loads(json.dumps(place)))
    for ours, theirs in zip(following, again, strict=False):
        np.testing.assert_array_equal(ours, theirs)
    other = next(iter(data.crops(stored, 1600, how, seed=1)))
    assert not np.array_equal(other, epoch[:4])


def test_audio_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [str(wavs(tmp_path / "in", [0.1, 0.2]))]
    first = data.store(inputs, 16_000, tmp_path / "store", 1)
    monkeypatch.setattr(data, "Decoders", None)
    again = data.store(inputs, 16_000, tmp_path / "store", 1)
    np.testing.assert_array_equal(first.samples, again.samples)
    with pytest.raises(TypeError):  # other clips: it would be decoded anew
        data.store([str(wavs(tmp_path / "more", [0.1]))], 16_000, tmp_path / "store", 1)


def test_clips_that_can_not_be_read(tmp_path: Path) -> None:
    folder = wavs(tmp_path / "in", [0.1] * 12)
    (folder / "bad.wav").write_bytes(b"RIFF")
    assert len(data.store([str(folder)], 16_000, tmp_path / "store", 1).levels) == 12
    (folder / "worse.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "silent.wav", np.zeros(100), 16_000)
    with pytest.raises(data.DataError, match="3 of 15 clips of process 0 can't be used: bad.wav: "):
        data.store([str(folder)], 16_000, tmp_path / "store", 1)


# Of everything a little, and no losses of spectra, which take most of a compilation.
SETTINGS = """
steps = 12
log = 2
evaluate = 6
checkpoint = 2
restart = 0.2
[model]
sampling_rate = 16000
encoder_dim = 8
encoder_rates = [2, 4]
decoder_dim = 16
decoder_rates = [4, 2]
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
begin = 9
periods = [2]
period_widths = [4, 8]
windows = [256]
spectrum_width = 4
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings, and the audio that they name."""
    folder = tmp_path_factory.mktemp("told")
    clips = folder / "clips"
    clips.mkdir()
    samples, rate = soundfile.read(audio.DATA / "speech_7s.wav", dtype="float32")
    for i in range(40):
        soundfile.write(clips / f"{i:02}.wav", samples[i * 2000 : i * 2000 + 20_000], rate)
    content = SETTINGS.replace("INPUTS", str(clips)).replace("HELD_OUT", str(audio.DATA / "speech_3s.wav"))
    path = folder / "settings.toml"
    path.write_text(content)
    return path


def start(told: Path, out: Path) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each. What one run compiled the next may use."""
    line = [sys.executable, "-m", "snax.cli", "train", str(told), "-o", str(out)]
    return jobs.together(line, 2, 2, JAX_COMPILATION_CACHE_DIR=str(told.parent / "compiled"))


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit())


def said(out: Path) -> list[dict[str, Any]]:
    """The log but for speeds."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_second"} for line in lines]


@pytest.fixture(scope="module")
def killed(told: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which every process was killed after a checkpoint, and that was then taken up again."""
    out = tmp_path_factory.mktemp("killed") / "run"
    running = start(told, out)
    while all(process.poll() is None for process in running) and not checkpoints(out):
        time.sleep(0.01)
    for process in running:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert checkpoints(out), "there was no checkpoint"
    assert checkpoints(out)[-1] < 12, "was not killed in time"
    jobs.finish(start(told, out))
    return out


def test_a_killed_run_ends_with_the_same_parameters(told: Path, killed: Path, tmp_path: Path) -> None:
    """Bit for bit those of a run that was left alone, with the same log but for speeds."""
    undisturbed = tmp_path / "undisturbed"
    jobs.finish(start(told, undisturbed))
    ours, theirs = (snax.load(out / "models" / "12") for out in (killed, undisturbed))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)
    lines = said(killed)
    assert lines == said(undisturbed)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if line["kind"] == "held_out"] == [6, 12]
    # The ninth step is the last without discriminators.
    assert [("adversarial" in line) for line in lines if line["kind"] == "train"] == [False] * 4 + [True] * 2
    assert checkpoints(killed) == [10, 12]
    assert list((killed / "tensorboard").glob("events*"))


def test_curves(killed: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(RECIPES / "curves.py"), str(killed / "log.jsonl"), str(tmp_path / "curves.png")]
    subprocess.run(line, check=True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_trained_model_goes_to_torch(killed: Path, tmp_path: Path) -> None:
    """The reference gives the same codes and the same audio with what training left."""
    model = snax.load(killed / "models" / "12")
    torch_files.write_folder(model, tmp_path / "torch")
    theirs = snac.SNAC.from_pretrained(str(tmp_path / "torch"))
    reference.assert_same(theirs.eval(), model, audio.clip("speech_7s.wav", 16_000, 2))


def test_other_settings_are_refused(told: Path, killed: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.toml"
    changed.write_text(told.read_text().replace("batch = 4", "batch = 8"))
    with pytest.raises(settings.SettingsError, match="a run with other settings, in data: choose another folder"):
        run.train(settings.read(changed), killed, None, 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(settings.SettingsError, match="is not empty, and not of a run: it has mine.txt"):
        run.train(settings.read(told), tmp_path / "full", None, 1)
    for source, model in ((None, None), ("snac_24khz", CONFIG)):
        with pytest.raises(settings.SettingsError, match="either the `model` of its settings or one to start --from"):
            run.train(dataclasses.replace(settings.read(told), model=model), tmp_path / str(source), source, 1)


def test_a_batch_that_devices_can_not_share(told: Path, tmp_path: Path) -> None:
    how = settings.read(told)
    how = dataclasses.replace(how, data=dataclasses.replace(how.data, batch=6))
    with pytest.raises(data.DataError, match="a batch of 6 can't be divided among 4 devices"):
        run.train(how, tmp_path / "run", None, 1)


def test_training_on(told: Path, killed: Path, tmp_path: Path) -> None:
    """--from begins with a model's weights: where nothing is learned, they are what comes out."""
    source = str(killed / "models" / "12")
    how = settings.read(told)
    optimizer = dataclasses.replace(how.optimizer, learning_rate=1e-30, weight_decay=0.0)
    how = dataclasses.replace(
        how, model=None, steps=2, evaluate=2, restart=0.0, optimizer=optimizer, discriminators=None
    )
    last = run.train(how, tmp_path / "on", source, 1)
    for ours, theirs in zip(jax.tree.leaves(snax.load(last)), jax.tree.leaves(snax.load(source)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-8)  # taken apart into gain and direction, and back


def test_a_run_that_diverges_says_so(told: Path, tmp_path: Path) -> None:
    how = settings.read(told)
    optimizer = dataclasses.replace(how.optimizer, learning_rate=1e30)
    how = dataclasses.replace(how, optimizer=optimizer, discriminators=None)
    with pytest.raises(run.DivergedError, match="no numbers any more: .*loss"):
        run.train(how, tmp_path / "run", None, 1)
