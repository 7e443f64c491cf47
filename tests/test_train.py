"""Losses and discriminators beside torch: values, and gradients by what is trained."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import recordings, torch_training
from helpers.pairs import pair
from torch.nn import functional

from snax.evaluate.spectra import mel_filters, stft
from snax.train import config as train_config
from snax.train import losses, weight_norm
from snax.train.discriminators import Discriminators
from snax.weights.torch_weights import named_tensors

RATE = 16_000
# Of a value, and of the norm of a gradient: float32 sums over thousands of samples, in another order than torch's.
VALUES, GRADIENTS = 1e-5, 1e-4
# Where it is of logarithms of single bins: the gradient by one near the floor is 1e5, of a value with 1e-7 of rounding.
GRADIENTS_OF_BINS = 1e-3


def two_clips(*, silence: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Speech and music with noise, and without; both with digital silence in them, if asked, where magnitudes are 0."""
    target = np.stack([recordings.clip(name, RATE, 1)[0] for name in ("speech_7s.wav", "guit_em9.flac")])
    noise = 0.1 * np.random.default_rng(0).standard_normal(target.shape, np.float32)
    if silence:
        target[0, :, 3000:8000] = noise[0, :, 3000:8000] = 0
    return target + noise, target


def assert_same(
    ours: Callable[..., jax.Array], theirs: Callable[..., torch.Tensor], *arrays: np.ndarray, bound: float = GRADIENTS
) -> None:
    """Values, and gradients by the first array."""
    value, gradient = jax.jit(jax.value_and_grad(ours))(*arrays)
    tensors = [torch.tensor(array) for array in arrays]
    expected = theirs(tensors[0].requires_grad_(), *tensors[1:])
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=VALUES)
    difference, size = np.linalg.norm(gradient - tensors[0].grad.numpy()), np.linalg.norm(tensors[0].grad)
    assert size > 0
    assert difference < bound * size


# librosa 0.11: filters.mel(sr=16000, n_fft=32, n_mels=5), the first six bins.
LIBROSA = [
    [0, 0, 0, 0, 0],
    [1.9779757e-03, 0, 0, 0, 0],
    [2.2324171e-05, 1.6671595e-03, 0, 0, 0],
    [0, 4.6616868e-04, 7.9040672e-04, 0, 0],
    [0, 0, 7.9627748e-04, 1.7635085e-04, 0],
    [0, 0, 3.2026245e-04, 4.5978968e-04, 0],
]


def test_mel_filters() -> None:
    np.testing.assert_allclose(mel_filters(16_000, 32, 5)[:6], LIBROSA, rtol=1e-6, atol=1e-12)


def test_mel_loss() -> None:
    assert_same(
        lambda x, y: losses.mel_loss(x, y, RATE),
        lambda x, y: torch_training.mel_loss(x, y, RATE),
        *two_clips(silence=True),
    )


def test_stft_loss() -> None:
    assert_same(losses.stft_loss, torch_training.stft_loss, *two_clips(), bound=GRADIENTS_OF_BINS)


def test_spectral_convergence_loss() -> None:
    assert_same(losses.spectral_convergence_loss, torch_training.spectral_convergence_loss, *two_clips(silence=True))


def test_spectral_convergence_loss_of_silence() -> None:
    """Silence for both: almost no loss, and a gradient of 0."""
    silence = np.zeros((1, 1, 8000), np.float32)
    value, gradient = jax.value_and_grad(losses.spectral_convergence_loss)(silence, silence)
    assert float(value) < 0.01
    assert not np.any(gradient)


def test_waveform_loss() -> None:
    assert_same(losses.waveform_loss, functional.l1_loss, *two_clips(silence=True))


def test_losses_of_the_quantizer() -> None:
    """The losses and their gradients are torch's."""
    torch_model, model, speech = pair("depthwise, noise")
    latents = model.audio_to_latents(speech)
    expected, expected_codes = model.quantize(latents)
    found = model.quantizer(latents)
    np.testing.assert_allclose(found.z_q, expected, rtol=0, atol=1e-6)  # fused in another way
    for ours, theirs in zip(found.codes, expected_codes, strict=True):
        np.testing.assert_array_equal(ours, theirs)

    def quantizer_losses(quantizer: Any, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        return losses.quantizer_losses(quantizer, quantizer(latents))

    def ours(latents: jax.Array, commitment_weight: jax.Array, codebook_weight: jax.Array) -> jax.Array:
        commitment, codebook = quantizer_losses(model.quantizer, latents)
        return commitment_weight * commitment + codebook_weight * codebook

    def theirs(latents: torch.Tensor, commitment_weight: torch.Tensor, codebook_weight: torch.Tensor) -> torch.Tensor:
        _, commitment, codebook = torch_training.quantize(torch_model.quantizer, latents.swapaxes(1, 2))
        return commitment_weight * commitment + codebook_weight * codebook

    for weights in ((np.float32(0.25), np.float32(1)), (np.float32(1), np.float32(0))):
        assert_same(ours, theirs, np.asarray(latents), *weights)

    still = jax.grad(lambda quantizer: quantizer_losses(quantizer, latents)[0])(model.quantizer)
    moved = jax.grad(lambda quantizer: quantizer_losses(quantizer, latents)[1])(model.quantizer)
    for one, other in zip(still.quantizers, moved.quantizers, strict=True):
        assert (one.codebook[...] == 0).all()
        assert (other.codebook[...] != 0).any()


@functools.cache
def small_discriminators() -> Discriminators:
    return Discriminators((2, 5), (512, 256), (4, 8, 16), 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("samples", [16_000, 15_999])
def test_features_of_discriminators(samples: int) -> None:
    clip = two_clips()[0][..., :samples]
    ours = jax.jit(lambda model, x: model(x))(small_discriminators(), clip)
    theirs = torch_training.TorchDiscriminators(small_discriminators())(torch.tensor(clip))
    for mine, other in zip(ours, theirs, strict=True):
        for features, expected in zip(mine, other, strict=True):
            expected = expected.detach().permute(0, 2, 3, 1).numpy()
            assert features.shape == expected.shape
            np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


LOSSES = {
    "discriminator": (losses.discriminator_loss, torch_training.discriminator_loss),
    "adversarial": (
        lambda fake, real: losses.adversarial_loss(fake),
        lambda fake, real: torch_training.adversarial_loss(fake),
    ),
    "feature_matching": (losses.feature_matching_loss, torch_training.feature_matching_loss),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_discriminators(name: str) -> None:
    ours, theirs = LOSSES[name]
    model, torch_model = small_discriminators(), torch_training.TorchDiscriminators(small_discriminators())
    assert_same(
        lambda x, y: ours(model(x), model(y)),
        lambda x, y: theirs(torch_model(x), torch_model(y)),
        *two_clips(),
    )


def test_full_size_is_that_of_the_descript_audio_codec() -> None:
    """Of its layers' shapes: 1 x 32 x 5 ... 1024 x 1024 x 5, and five bands of five layers; counted by hand."""
    config = train_config.Discriminators()
    model = nnx.eval_shape(
        lambda: Discriminators(
            config.periods, config.fft_sizes, config.period_widths, config.spectrum_width, rngs=nnx.Rngs(0)
        )
    )
    period = sum(i * o * 5 + o for i, o in ((1, 32), (32, 128), (128, 512), (512, 1024), (1024, 1024))) + 1024 * 3 + 1
    band = 2 * 32 * 27 + 32 + 3 * (32 * 32 * 27 + 32) + 32 * 32 * 9 + 32
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 5 * period + 3 * (5 * band + 32 * 9 + 1)


def test_silence_has_gradients() -> None:
    silence = jnp.zeros((1, 1, 4096))
    scales = ((256, 40), (2048, 320))
    for loss in (functools.partial(losses.mel_loss, rate=RATE, scales=scales), losses.stft_loss):
        assert np.isfinite(jax.jit(jax.grad(lambda x, loss=loss: loss(x, 0.1 + silence)))(silence)).all()


def test_stft_of_a_tone() -> None:
    """A sine of amplitude 1 on a bin: half of the window's sum there, a quarter beside it."""
    tone = np.cos(2 * np.pi * 8 * np.arange(1024) / 64).astype(np.float32)
    spectrum = np.abs(stft(tone, 64))
    assert spectrum.shape == (65, 33)
    np.testing.assert_allclose(spectrum[8:-8, 7:10], np.broadcast_to([8, 16, 8], (49, 3)), atol=1e-4)


@pytest.mark.slow
def test_weight_norm() -> None:
    """Gradients by `g` and `v` are those of the reference with weight norm. Split and merged kernels are unchanged."""
    _, model, speech = pair("no noise")
    normed = weight_norm.split(model)
    for ours, theirs in zip(jax.tree.leaves(weight_norm.merge(normed)), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=0)  # a division and a product in float32

    reference = torch_training.reference(model)
    part = speech[..., : 200 * model.config.pad_multiple]
    latents = np.asarray(model.audio_to_latents(part))
    rng = np.random.default_rng(0)
    by_latents, by_audio = rng.standard_normal(latents.shape, np.float32), rng.standard_normal(part.shape, np.float32)

    @jax.jit
    @jax.grad
    def gradients(normed: weight_norm.WeightNormed) -> jax.Array:
        model = weight_norm.merge(normed)
        return (model.audio_to_latents(part) * by_latents).mean() + (model.latents_to_audio(latents) * by_audio).mean()

    encoded = reference.encoder(torch.tensor(part)).swapaxes(1, 2)
    decoded = reference.decoder(torch.tensor(latents).swapaxes(1, 2))
    loss = (encoded * torch.tensor(by_latents)).mean() + (decoded * torch.tensor(by_audio)).mean()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}

    ours = gradients(normed)
    tensors = [tensor for tensor in named_tensors(ours.v) if not tensor.name.startswith("quantizer")]
    assert len([tensor for tensor in tensors if tensor.weight_norm]) > 20
    for tensor in tensors:
        found = {tensor.name: tensor.to_torch(np.asarray(tensor.parameter[...]))}
        if tensor.weight_norm:
            parametrized = tensor.name.replace(".weight", ".parametrizations.weight.original")
            gain = np.asarray(ours.g[tensor.name]).reshape(-1, 1, 1)
            found = {f"{parametrized}0": gain, f"{parametrized}1": found[tensor.name]}
        for name, gradient in found.items():
            size = expected[name].norm().item()
            assert gradient.shape == expected[name].shape
            assert size > 0
            assert np.linalg.norm(gradient - expected[name].numpy()) < GRADIENTS * size, name
