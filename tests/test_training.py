"""Training configuration, training data, and training steps compared with torch."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
import torch
from flax import nnx
from helpers import recordings, small, torch_training
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import snax
from snax.codec.config import PUBLISHED_CONFIGS
from snax.train import config as train_config
from snax.train import data
from snax.train.quantizer_init import fit_quantizer
from snax.train.step import TrainState, init_state, train_step
from snax.train.weight_norm import merge

pytestmark = pytest.mark.usefixtures("optax_mixes")

MODEL_CONFIG = dataclasses.replace(small.CONFIG, noise=False)
TRAIN_CONFIG = train_config.TrainConfig(
    steps=3,
    data=train_config.Data(inputs=("-",), batch=4),
    model=MODEL_CONFIG,
    # Larger than the default, so that errors show within three steps. (At 1e-3, a vector of the third batch is about
    # equally near to two codebook rows. Rounding decides between them, which changes 1e-3 of the gradient.)
    optimizer=train_config.Optimizer(learning_rate=3e-4, lr_decay=0.9, max_grad_norm=10.0),
    # Without the STFT loss: small bins, whose values are rounding errors, have large gradients of their logarithms.
    losses=train_config.Losses(waveform=1.0),
    ema_decay=0.5,
    discriminators=train_config.Discriminators(
        periods=(2, 5), fft_sizes=(512, 256), period_widths=(4, 8, 16), spectrum_width=4
    ),
)
# For tests that do not depend on losses and layers. It has few layers, so it compiles in half the time.
PLAIN_CONFIG = dataclasses.replace(
    TRAIN_CONFIG,
    model=dataclasses.replace(MODEL_CONFIG, encoder_rates=(4,), latent_dim=0, decoder_rates=(4,)),
    losses=train_config.Losses(mel=0.0, waveform=1.0),
    discriminators=train_config.Discriminators(periods=(2,), fft_sizes=(256,), period_widths=(4, 8), spectrum_width=4),
)
SAMPLES = 4096
RECIPES = Path(__file__).parents[1] / "recipes"


def batches(count: int) -> list[np.ndarray]:
    """Return batches of four crops of speech and music."""
    clips = np.concatenate([recordings.clip(name, 16_000, 1.6)[0] for name in ("speech_7s.wav", "guit_em9.flac")])
    parts = clips[:, : 6 * SAMPLES].reshape(2, 6, SAMPLES).swapaxes(0, 1).reshape(-1, 4, 1, SAMPLES)
    return list(parts[:count])


@functools.cache
def jitted_step(config: train_config.TrainConfig, *, adversarial: bool) -> Any:
    return jax.jit(functools.partial(train_step, config=config, adversarial=adversarial))


def initial_state() -> TrainState:
    assert PLAIN_CONFIG.model is not None
    return init_state(small.model(PLAIN_CONFIG.model), PLAIN_CONFIG)


@pytest.mark.parametrize("adversarial", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_of_steps_match_torch(adversarial: bool) -> None:
    """The losses of a step depend on all parameters after the previous steps, including the discriminators'."""
    model = small.model(MODEL_CONFIG)
    state = init_state(model, TRAIN_CONFIG)
    assert state.discriminator_state is not None
    networks = state.discriminator_state.networks if adversarial else None
    torch_trainer = torch_training.Trainer(model, networks, TRAIN_CONFIG)
    step = jitted_step(TRAIN_CONFIG, adversarial=adversarial)
    for i, batch in enumerate(batches(3)):
        state, metrics = step(state, batch)
        for name, expected in torch_trainer.step(torch.tensor(batch)).items():
            # Adam divides a gradient by its own size, so rounding errors move parameters whose gradient is almost 0.
            assert float(metrics[name]) == pytest.approx(expected, rel=1e-5 if i == 0 else 1e-3), (i, name)
    assert int(state.step) == 3


@pytest.mark.slow
def test_data_parallel_step() -> None:
    """A step on four devices, each with a quarter of the batch, equals a step on one device."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    (batch,) = batches(1)
    state = initial_state()
    step = jitted_step(PLAIN_CONFIG, adversarial=True)
    expected_state, expected = step(state, batch)
    parallel_state, metrics = step(
        jax.device_put(state, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))),
    )
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(expected[name]), rel=1e-5), name  # sums in another order
    for usage, expected_usage in zip(parallel_state.usage, expected_state.usage, strict=True):
        np.testing.assert_allclose(usage, expected_usage, rtol=1e-6)


@pytest.mark.slow
def test_bfloat16_keeps_float32_state() -> None:
    (batch,) = batches(1)
    state = initial_state()
    _, expected = jitted_step(PLAIN_CONFIG, adversarial=True)(state, batch)
    config = dataclasses.replace(PLAIN_CONFIG, dtype="bfloat16")
    after, metrics = jitted_step(config, adversarial=True)(state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if jnp.issubdtype(leaf.dtype, jnp.floating)} == {
        jnp.dtype("float32")
    }
    # bfloat16 has a precision of 0.4 %, here through a dozen layers. Equal values would mean that it was not used.
    assert float(metrics["feature_matching"]) == pytest.approx(float(expected["feature_matching"]), rel=0.03)
    assert float(metrics["feature_matching"]) != float(expected["feature_matching"])


@pytest.mark.slow
def test_ema_and_usage() -> None:
    """The decay of the moving average increases over the first steps. The usage of a codebook sums to its size."""
    state = initial_state()
    step = jitted_step(PLAIN_CONFIG, adversarial=False)
    expected = np.asarray(state.ema.encoder.conv_in.kernel[...])
    for i, batch in enumerate(batches(3)):
        state, _ = step(state, batch)
        decay = min(PLAIN_CONFIG.ema_decay, (1 + i) / (10 + i))
        kernel = np.asarray(merge(state.codec).encoder.conv_in.kernel[...])
        expected = decay * expected + (1 - decay) * kernel
        np.testing.assert_allclose(state.ema.encoder.conv_in.kernel[...], expected, rtol=1e-5, atol=1e-7)
        for usage in state.usage:
            assert float(usage.sum()) == pytest.approx(MODEL_CONFIG.codebook_size, rel=1e-4)


@pytest.mark.slow
def test_dead_codes_are_restarted() -> None:
    """Rarely selected rows are replaced in the codec and in its moving average. Other rows are not."""
    config = dataclasses.replace(PLAIN_CONFIG, dead_code_threshold=0.5)
    (batch,) = batches(1)
    state = initial_state()
    rows = np.arange(MODEL_CONFIG.codebook_size) < 10
    state = state._replace(usage=tuple(jnp.where(rows, 0.0, 2.0) for _ in state.usage))
    after, _ = jitted_step(config, adversarial=False)(state, batch)
    without_restart, _ = jitted_step(PLAIN_CONFIG, adversarial=False)(state, batch)
    levels, expected_levels = after.codec.v.quantizer.quantizers, without_restart.codec.v.quantizer.quantizers
    for i, (level, expected_level) in enumerate(zip(levels, expected_levels, strict=True)):
        changed = (level.codebook[...] != expected_level.codebook[...]).any(axis=1)
        # Some of the first ten rows may have been selected so often in this step that they are not dead any more.
        assert not changed[10:].any()
        assert changed[:10].sum() >= 5
        ema = after.ema.quantizer.quantizers[i].codebook[...]
        np.testing.assert_array_equal(ema[changed], level.codebook[...][changed])
        assert (after.usage[i][changed] == 1).all()


@pytest.mark.slow
def test_fit_quantizer() -> None:
    """After fitting, each level reduces the residual and uses its rows. A random level increases the residual."""
    (batch,) = batches(1)

    def relative_residuals(model: snax.SNAC) -> list[float]:
        residual = latents = model.audio_to_latents(batch)
        energies = []
        for level in model.quantizer.quantizers:
            residual = residual - level(residual).z_q
            energies.append(float(jnp.square(residual).mean() / latents.var((0, 1)).mean()))
        return energies

    model = snax.SNAC(dataclasses.replace(MODEL_CONFIG, codebook_size=256), rngs=nnx.Rngs(0))
    fitted = jax.jit(fit_quantizer)(model, batch)
    assert relative_residuals(model)[0] > 1
    first, second, third = relative_residuals(fitted)
    assert 1 > first > second > third
    latents = fitted.audio_to_latents(batch)
    np.testing.assert_allclose(latents.mean((0, 1)), 0, atol=1e-4)  # in float32: the mean was a thousand times this
    assert float(latents.std((0, 1)).mean()) == pytest.approx(1, abs=1e-4)
    for codes in fitted.encode(batch):
        assert len(np.unique(codes)) > 0.3 * min(256, codes.size)


INVALID_CONFIGS: dict[str, tuple[str, str]] = {
    "not TOML": ("steps = = 3", "cannot be read as TOML"),
    "empty": ("", "`steps` is missing"),
    "unknown field": ("steps = 3\nstep = 4\n[data]\ninputs = ['a']", "`step` is not a field. Did you mean `steps`?"),
    "unknown field in a table": ("steps = 3\n[data]\ninput = ['a']", "`data.input` is not a field."),
    "no inputs": ("steps = 3\n[data]\ninputs = []", "`data.inputs` (=[]) must have at least 1 item"),
    "type": ("steps = '3'\n[data]\ninputs = ['a']", "`steps` (='3') must be a valid integer"),
    "bool": ("steps = true\n[data]\ninputs = ['a']", "`steps` (=True) must be a valid integer"),
    "not a table": ("steps = 3\ndata = 4", "`data` (=4) must be a table"),
    "list length": ("steps = 3\n[data]\ninputs = ['a']\nrms_db = [-1]", "`data.rms_db.1` is missing"),
    "wrong order": ("steps = 3\n[data]\ninputs = ['a']\nrms_db = [-10, -20]", "`data.rms_db`: the first level"),
    "model": ("steps = 3\n[data]\ninputs = ['a']\n[model]\nencoder_dims = 3", "`model`: unknown fields"),
    "negative": ("steps = 3\n[data]\ninputs = ['a']\n[losses]\nmel = -1", "`losses.mel` (=-1) must be greater"),
    "infinite": (
        "steps = 3\n[data]\ninputs = ['a']\ncrop_seconds = inf",
        "`data.crop_seconds` (=inf) must be a finite",
    ),
    "FFT size": (
        "steps = 3\n[data]\ninputs = ['a']\n[discriminators]\nfft_sizes = [510]",
        "`discriminators.fft_sizes.0` (=510) must be a multiple of 4",
    ),
    "period of 0": (
        "steps = 3\n[data]\ninputs = ['a']\n[discriminators]\nperiods = [0]",
        "`discriminators.periods.0` (=0) must be greater than or equal to 1",
    ),
    "deeply nested": ("steps = " + "[" * 9999, "cannot be read as TOML"),
    "dtype": ("steps = 3\ndtype = 'int8'\n[data]\ninputs = ['a']", "`dtype` (='int8') must be 'float32' or 'bfloat16'"),
}


@pytest.mark.parametrize("name", INVALID_CONFIGS)
def test_invalid_configs(name: str, tmp_path: Path) -> None:
    content, message = INVALID_CONFIGS[name]
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(train_config.ConfigError) as caught:
        train_config.read(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    """All recipes are valid. The recipe of a published model has its architecture."""
    recipe = train_config.read(path)
    assert recipe.model == PUBLISHED_CONFIGS.get(path.stem, recipe.model)
    assert (recipe.model is None) == (path.stem in {"finetune", "mini_16khz_2"})


def write_square_waves(folder: Path, seconds: list[float]) -> Path:
    """Write clips whose samples identify them: clip i has only values of about (i + 1) / 10 and their negatives."""
    folder.mkdir(exist_ok=True)
    for i, length in enumerate(seconds):
        sign = np.sign(np.sin(np.arange(round(length * 16_000)) + 0.5))
        soundfile.write(folder / f"{i}.wav", (i + 1) / 10 * sign, 16_000, subtype="FLOAT")
    return folder


def test_crops(tmp_path: Path) -> None:
    """An epoch has each stretch once. Levels are random, short clips are padded, and an iterator can be restored."""
    inputs = (str(write_square_waves(tmp_path / "in", [0.05, 0.3, 1.0])),)
    decoded = data.decode_corpus(inputs, 16_000, tmp_path / "store", 1)
    assert decoded.lengths.tolist() == [800, 4800, 16_000]
    np.testing.assert_allclose(decoded.levels, 0, atol=1e-3)  # the RMS of a square wave equals its peak
    data_config = train_config.Data(inputs=inputs, batch=4, rms_db=(-30.0, -20.0))
    iterator = iter(data.crops(decoded, 1600, data_config, seed=0))
    epoch = np.concatenate([next(iterator) for _ in range(7)])  # 2 epochs of 1 + 3 + 10 stretches
    assert epoch.shape == (28, 1, 1600)
    lengths = (epoch != 0).sum(axis=(1, 2))
    assert sorted(lengths.tolist()) == [800] * 2 + [1600] * 26
    levels = 20 * np.log10(np.abs(epoch).max(axis=(1, 2)))
    assert levels.min() > -30.01
    assert levels.max() < -19.99
    assert np.ptp(levels) > 5

    state, expected = iterator.get_state(), [next(iterator) for _ in range(3)]
    restored = iter(data.crops(decoded, 1600, data_config, seed=0))
    restored.set_state(json.loads(json.dumps(state)))
    for expected_batch, batch in zip(expected, restored, strict=False):
        np.testing.assert_array_equal(batch, expected_batch)
    other_seed = next(iter(data.crops(decoded, 1600, data_config, seed=1)))
    assert not np.array_equal(other_seed, epoch[:4])


def test_audio_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [str(write_square_waves(tmp_path / "in", [0.1, 0.2]))]
    first = data.decode_corpus(inputs, 16_000, tmp_path / "store", 1)
    monkeypatch.setattr(data, "DecoderPool", None)
    second = data.decode_corpus(inputs, 16_000, tmp_path / "store", 1)
    np.testing.assert_array_equal(first.samples, second.samples)
    with pytest.raises(TypeError):  # other inputs are decoded, which calls the None above
        data.decode_corpus([str(write_square_waves(tmp_path / "more", [0.1]))], 16_000, tmp_path / "store", 1)


def test_unreadable_clips(tmp_path: Path) -> None:
    folder = write_square_waves(tmp_path / "in", [0.1] * 12)
    (folder / "bad.wav").write_bytes(b"RIFF")
    assert len(data.decode_corpus([str(folder)], 16_000, tmp_path / "store", 1).levels) == 12
    (folder / "worse.wav").write_bytes(b"RIFF")
    soundfile.write(folder / "silent.wav", np.zeros(100), 16_000)
    with pytest.raises(data.DataError, match="3 of 15 clips of process 0 cannot be used, such as bad.wav: "):
        data.decode_corpus([str(folder)], 16_000, tmp_path / "store", 1)
