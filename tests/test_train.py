"""Losses, discriminators and weight norm, compared with torch: values and gradients."""

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
# Relative tolerances of values and of gradients (by norm). Sums over thousands of samples in float32 have another order
# in torch.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
# For logarithms of single bins: near the floor their gradient is 1e5, and values have a rounding error of 1e-7.
LOG_BIN_GRADIENT_TOLERANCE = 1e-3


def noisy_and_clean(*, silence: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return speech and music with added noise and without. With `silence`, both have a stretch of digital silence."""
    target = np.stack([recordings.clip(name, RATE, 1)[0] for name in ("speech_7s.wav", "guit_em9.flac")])
    noise = 0.1 * np.random.default_rng(0).standard_normal(target.shape, np.float32)
    if silence:
        target[0, :, 3000:8000] = noise[0, :, 3000:8000] = 0
    return target + noise, target


def assert_matches_torch(
    loss: Callable[..., jax.Array],
    torch_loss: Callable[..., torch.Tensor],
    *arrays: np.ndarray,
    gradient_tolerance: float = GRADIENT_TOLERANCE,
) -> None:
    """Compare the values of two losses, and their gradients with respect to the first array."""
    value, gradient = jax.jit(jax.value_and_grad(loss))(*arrays)
    tensors = [torch.tensor(array) for array in arrays]
    expected = torch_loss(tensors[0].requires_grad_(), *tensors[1:])
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=VALUE_TOLERANCE)
    difference, norm = np.linalg.norm(gradient - tensors[0].grad.numpy()), np.linalg.norm(tensors[0].grad)
    assert norm > 0
    assert difference < gradient_tolerance * norm


# The first six bins of `filters.mel(sr=16000, n_fft=32, n_mels=5)` from librosa 0.11.
LIBROSA_FILTERS = [
    [0, 0, 0, 0, 0],
    [1.9779757e-03, 0, 0, 0, 0],
    [2.2324171e-05, 1.6671595e-03, 0, 0, 0],
    [0, 4.6616868e-04, 7.9040672e-04, 0, 0],
    [0, 0, 7.9627748e-04, 1.7635085e-04, 0],
    [0, 0, 3.2026245e-04, 4.5978968e-04, 0],
]


def test_mel_filters() -> None:
    np.testing.assert_allclose(mel_filters(16_000, 32, 5)[:6], LIBROSA_FILTERS, rtol=1e-6, atol=1e-12)


def test_mel_loss() -> None:
    assert_matches_torch(
        lambda x, y: losses.mel_loss(x, y, RATE),
        lambda x, y: torch_training.mel_loss(x, y, RATE),
        *noisy_and_clean(silence=True),
    )


def test_stft_loss() -> None:
    assert_matches_torch(
        losses.stft_loss, torch_training.stft_loss, *noisy_and_clean(), gradient_tolerance=LOG_BIN_GRADIENT_TOLERANCE
    )


def test_spectral_convergence_loss() -> None:
    assert_matches_torch(
        losses.spectral_convergence_loss, torch_training.spectral_convergence_loss, *noisy_and_clean(silence=True)
    )


def test_spectral_convergence_loss_of_silence() -> None:
    """If both are silent, the loss is almost 0 and the gradient is 0."""
    silence = np.zeros((1, 1, 8000), np.float32)
    value, gradient = jax.value_and_grad(losses.spectral_convergence_loss)(silence, silence)
    assert float(value) < 0.01
    assert not np.any(gradient)


def test_waveform_loss() -> None:
    assert_matches_torch(losses.waveform_loss, functional.l1_loss, *noisy_and_clean(silence=True))


def test_quantizer_losses() -> None:
    torch_model, model, speech = pair("depthwise, noise")
    latents = model.audio_to_latents(speech)
    expected, expected_codes = model.quantize(latents)
    quantized = model.quantizer(latents)
    np.testing.assert_allclose(quantized.z_q, expected, rtol=0, atol=1e-6)  # XLA fuses the two programs differently
    for level, expected_level in zip(quantized.codes, expected_codes, strict=True):
        np.testing.assert_array_equal(level, expected_level)

    def quantizer_losses(quantizer: Any, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        return losses.quantizer_losses(quantizer, quantizer(latents))

    def loss(latents: jax.Array, commitment_weight: jax.Array, codebook_weight: jax.Array) -> jax.Array:
        commitment, codebook = quantizer_losses(model.quantizer, latents)
        return commitment_weight * commitment + codebook_weight * codebook

    def torch_loss(
        latents: torch.Tensor, commitment_weight: torch.Tensor, codebook_weight: torch.Tensor
    ) -> torch.Tensor:
        _, commitment, codebook = torch_training.quantize(torch_model.quantizer, latents.swapaxes(1, 2))
        return commitment_weight * commitment + codebook_weight * codebook

    for weights in ((np.float32(0.25), np.float32(1)), (np.float32(1), np.float32(0))):
        assert_matches_torch(loss, torch_loss, np.asarray(latents), *weights)

    commitment_gradient = jax.grad(lambda quantizer: quantizer_losses(quantizer, latents)[0])(model.quantizer)
    codebook_gradient = jax.grad(lambda quantizer: quantizer_losses(quantizer, latents)[1])(model.quantizer)
    for level in commitment_gradient.quantizers:
        assert (level.codebook[...] == 0).all()
    for level in codebook_gradient.quantizers:
        assert (level.codebook[...] != 0).any()


@functools.cache
def small_discriminators() -> Discriminators:
    return Discriminators((2, 5), (512, 256), (4, 8, 16), 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("samples", [16_000, 15_999])
def test_discriminator_features(samples: int) -> None:
    clip = noisy_and_clean()[0][..., :samples]
    all_features = jax.jit(lambda model, x: model(x))(small_discriminators(), clip)
    all_expected = torch_training.TorchDiscriminators(small_discriminators())(torch.tensor(clip))
    for discriminator_features, discriminator_expected in zip(all_features, all_expected, strict=True):
        for features, expected in zip(discriminator_features, discriminator_expected, strict=True):
            expected = expected.detach().permute(0, 2, 3, 1).numpy()
            assert features.shape == expected.shape
            np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


DISCRIMINATOR_LOSSES = {
    "discriminator": (losses.discriminator_loss, torch_training.discriminator_loss),
    "adversarial": (
        lambda fake, real: losses.adversarial_loss(fake),
        lambda fake, real: torch_training.adversarial_loss(fake),
    ),
    "feature_matching": (losses.feature_matching_loss, torch_training.feature_matching_loss),
}


@pytest.mark.parametrize("name", DISCRIMINATOR_LOSSES)
def test_discriminator_losses(name: str) -> None:
    loss, torch_loss = DISCRIMINATOR_LOSSES[name]
    model, torch_model = small_discriminators(), torch_training.TorchDiscriminators(small_discriminators())
    assert_matches_torch(
        lambda x, y: loss(model(x), model(y)),
        lambda x, y: torch_loss(torch_model(x), torch_model(y)),
        *noisy_and_clean(),
    )


def test_default_discriminators_have_dac_parameter_count() -> None:
    """The expected count follows from the kernel shapes of the Descript Audio Codec."""
    config = train_config.Discriminators()
    model = nnx.eval_shape(
        lambda: Discriminators(
            config.periods, config.fft_sizes, config.period_widths, config.spectrum_width, rngs=nnx.Rngs(0)
        )
    )
    widths = ((1, 32), (32, 128), (128, 512), (512, 1024), (1024, 1024))
    period = sum(ins * outs * 5 + outs for ins, outs in widths) + 1024 * 3 + 1
    band = 2 * 32 * 27 + 32 + 3 * (32 * 32 * 27 + 32) + 32 * 32 * 9 + 32
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 5 * period + 3 * (5 * band + 32 * 9 + 1)


def test_gradients_at_silence_are_finite() -> None:
    silence = jnp.zeros((1, 1, 4096))
    scales = ((256, 40), (2048, 320))
    for loss in (functools.partial(losses.mel_loss, rate=RATE, scales=scales), losses.stft_loss):
        assert np.isfinite(jax.jit(jax.grad(lambda x, loss=loss: loss(x, 0.1 + silence)))(silence)).all()


def test_stft_of_sine() -> None:
    """A sine of amplitude 1 at a bin's frequency gives half of the window's sum there, and half of that beside it."""
    tone = np.cos(2 * np.pi * 8 * np.arange(1024) / 64).astype(np.float32)
    spectrum = np.abs(stft(tone, 64))
    assert spectrum.shape == (65, 33)
    np.testing.assert_allclose(spectrum[8:-8, 7:10], np.broadcast_to([8, 16, 8], (49, 3)), atol=1e-4)


@pytest.mark.slow
def test_weight_norm() -> None:
    """Splitting and merging keeps kernels. Gradients with respect to `g` and `v` are those of the reference."""
    _, model, speech = pair("no noise")
    normed = weight_norm.split(model)
    for merged, original in zip(jax.tree.leaves(weight_norm.merge(normed)), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(merged, original, rtol=1e-6, atol=0)  # a division and a product in float32

    torch_model = torch_training.reference(model)
    audio = speech[..., : 200 * model.config.pad_multiple]
    latents = np.asarray(model.audio_to_latents(audio))
    rng = np.random.default_rng(0)
    latents_weight = rng.standard_normal(latents.shape, np.float32)
    audio_weight = rng.standard_normal(audio.shape, np.float32)

    @jax.jit
    @jax.grad
    def gradients(normed: weight_norm.WeightNormed) -> jax.Array:
        model = weight_norm.merge(normed)
        encoded, decoded = model.audio_to_latents(audio), model.latents_to_audio(latents)
        return (encoded * latents_weight).mean() + (decoded * audio_weight).mean()

    encoded = torch_model.encoder(torch.tensor(audio)).swapaxes(1, 2)
    decoded = torch_model.decoder(torch.tensor(latents).swapaxes(1, 2))
    loss = (encoded * torch.tensor(latents_weight)).mean() + (decoded * torch.tensor(audio_weight)).mean()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in torch_model.named_parameters()}

    normed_gradients = gradients(normed)
    tensors = [tensor for tensor in named_tensors(normed_gradients.v) if not tensor.name.startswith("quantizer")]
    assert len([tensor for tensor in tensors if tensor.weight_norm]) > 20
    for tensor in tensors:
        by_torch_name = {tensor.name: tensor.to_torch(np.asarray(tensor.parameter[...]))}
        if tensor.weight_norm:
            prefix = tensor.name.replace(".weight", ".parametrizations.weight.original")
            g = np.asarray(normed_gradients.g[tensor.name]).reshape(-1, 1, 1)
            by_torch_name = {f"{prefix}0": g, f"{prefix}1": by_torch_name[tensor.name]}
        for name, gradient in by_torch_name.items():
            norm = expected[name].norm().item()
            assert gradient.shape == expected[name].shape
            assert norm > 0
            assert np.linalg.norm(gradient - expected[name].numpy()) < GRADIENT_TOLERANCE * norm, name
