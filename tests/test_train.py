"""Losses and discriminators beside torch: values, and gradients by what is trained."""

import functools
from collections.abc import Callable

import audio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import snac
import torch
from flax import nnx
from pairs import pair
from torch import nn
from torch.nn import functional

from snax.spectra import MEL_SCALES, mel_filters, stft
from snax.torch_weights import _tensors, to_torch
from snax.train import losses, weight_norm
from snax.train.discriminators import BANDS, Discriminators, PeriodDiscriminator, SpectrumDiscriminator

RATE = 16_000
# Of a value, and of the norm of a gradient: float32 sums over thousands of samples, in another order than torch's.
VALUES, GRADIENTS = 1e-5, 1e-4
# Where it is of logarithms of single bins: the gradient by one near the floor is 1e5, of a value with 1e-7 of rounding.
GRADIENTS_OF_BINS = 1e-3


def two_clips(*, silence: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Speech and music with noise, and without; both with digital silence in them, if asked, where magnitudes are 0."""
    target = np.stack([audio.clip(name, RATE, 1)[0] for name in ("speech_7s.wav", "guit_em9.flac")])
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


def torch_magnitude(x: torch.Tensor, window_length: int) -> torch.Tensor:
    window = torch.hann_window(window_length)
    spectrum = torch.stft(x[:, 0], window_length, window_length // 4, window=window, return_complex=True)
    return spectrum.abs()


def torch_log(x: torch.Tensor, power: int) -> torch.Tensor:
    return x.clamp(1e-5).pow(power).log10()


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
    def theirs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = torch.zeros(())
        for window_length, bands in MEL_SCALES:
            filters = torch.tensor(mel_filters(RATE, window_length, bands)).T
            x_mel, y_mel = (filters @ torch_magnitude(each, window_length) for each in (x, y))
            loss = loss + functional.l1_loss(torch_log(x_mel, 1), torch_log(y_mel, 1))
        return loss

    assert_same(lambda x, y: losses.mel_loss(x, y, RATE), theirs, *two_clips(silence=True))


def test_stft_loss() -> None:
    def theirs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = torch.zeros(())
        for window_length in (2048, 512):
            x_magnitude, y_magnitude = (torch_magnitude(each, window_length) for each in (x, y))
            loss = loss + functional.l1_loss(torch_log(x_magnitude, 2), torch_log(y_magnitude, 2))
            loss = loss + functional.l1_loss(x_magnitude, y_magnitude)
        return loss

    assert_same(losses.stft_loss, theirs, *two_clips(), bound=GRADIENTS_OF_BINS)


def test_waveform_loss() -> None:
    assert_same(losses.waveform_loss, functional.l1_loss, *two_clips(silence=True))


def test_losses_of_the_quantizer() -> None:
    """Quantized latents and codes are the codec's; the losses and their gradients torch's."""
    torch_model, model, speech = pair("depthwise, noise")
    latents = model.audio_to_latents(speech)
    expected, expected_codes = model.quantize(latents)
    quantized, codes, _, _ = losses.quantize(model.quantizer, latents)
    np.testing.assert_allclose(quantized, expected, rtol=0, atol=1e-6)  # fused in another way
    for ours, theirs in zip(codes, expected_codes, strict=True):
        np.testing.assert_array_equal(ours, theirs)

    def ours(latents: jax.Array, commitment_weight: jax.Array, codebook_weight: jax.Array) -> jax.Array:
        found = losses.quantize(model.quantizer, latents)
        return commitment_weight * found.commitment + codebook_weight * found.codebook

    def theirs(latents: torch.Tensor, commitment_weight: torch.Tensor, codebook_weight: torch.Tensor) -> torch.Tensor:
        residual, loss = latents.swapaxes(1, 2), torch.zeros(())
        for level, level_codes in zip(torch_model.quantizer.quantizers, codes, strict=True):
            vectors = level.in_proj(functional.avg_pool1d(residual, level.stride, level.stride))
            rows = level.decode_code(torch.tensor(np.asarray(level_codes)))
            loss = loss + commitment_weight * functional.mse_loss(vectors, rows.detach())
            loss = loss + codebook_weight * functional.mse_loss(rows, vectors.detach())
            added = level.out_proj(vectors + (rows - vectors).detach())
            residual = residual - added.repeat_interleave(level.stride, dim=-1)
        return loss

    for weights in ((np.float32(0.25), np.float32(1)), (np.float32(1), np.float32(0))):
        assert_same(ours, theirs, np.asarray(latents), *weights)

    still = jax.grad(lambda quantizer: losses.quantize(quantizer, latents).commitment)(model.quantizer)
    moved = jax.grad(lambda quantizer: losses.quantize(quantizer, latents).codebook)(model.quantizer)
    for one, other in zip(still.quantizers, moved.quantizers, strict=True):
        assert (one.codebook[...] == 0).all()
        assert (other.codebook[...] != 0).any()


def conv(layer: nnx.Module, stride: tuple[int, int]) -> nn.Conv2d:
    """The same layer in torch."""
    height, width, ins, outs = layer.kernel.shape
    theirs = nn.Conv2d(ins, outs, (height, width), stride, (height // 2, width // 2))
    theirs.weight.data = torch.tensor(np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1))
    theirs.bias.data = torch.tensor(np.asarray(layer.bias[...]))
    return theirs


def torch_layers(x: torch.Tensor, layers: nnx.List, strides: list[tuple[int, int]]) -> list[torch.Tensor]:
    outputs = []
    for layer, stride in zip(layers, strides, strict=True):
        x = functional.leaky_relu(conv(layer, stride)(x), 0.1)
        outputs.append(x)
    return outputs


def torch_period(ours: PeriodDiscriminator, x: torch.Tensor) -> list[torch.Tensor]:
    x = functional.pad(x[:, None], (0, ours.period - x.shape[1] % ours.period), mode="reflect")
    folded = x.unflatten(2, (-1, ours.period))
    outputs = torch_layers(folded, ours.layers, [(3, 1)] * (len(ours.layers) - 1) + [(1, 1)])
    return [*outputs, conv(ours.judge, (1, 1))(outputs[-1])]


def torch_spectrum(ours: SpectrumDiscriminator, x: torch.Tensor) -> list[torch.Tensor]:
    window_length, hop = ours.window_length, ours.window_length // 4
    pad = (window_length - hop) // 2
    x = functional.pad(x[:, None], (pad, pad + -x.shape[1] % hop), mode="reflect")[:, 0]
    window = torch.hann_window(window_length)
    spectrum = torch.stft(x, window_length, hop, window=window, return_complex=True)[..., 2:-2]
    parts = torch.view_as_real(spectrum).permute(0, 3, 2, 1)
    bins = window_length // 2 + 1
    strides = [(1, 1), (1, 2), (1, 2), (1, 2), (1, 1)]
    by_band = [
        torch_layers(parts[..., int(low * bins) : int(high * bins)], layers, strides)
        for (low, high), layers in zip(BANDS, ours.bands, strict=True)
    ]
    judged = conv(ours.judge, (1, 1))(torch.cat([outputs[-1] for outputs in by_band], dim=-1))
    return [*(output for outputs in by_band for output in outputs), judged]


def torch_discriminators(ours: Discriminators, x: torch.Tensor) -> list[list[torch.Tensor]]:
    x = x[:, 0] - x[:, 0].mean(dim=1, keepdim=True)
    x = 0.8 * x / (x.abs().max(dim=1, keepdim=True)[0] + 1e-9)
    kinds = {PeriodDiscriminator: torch_period, SpectrumDiscriminator: torch_spectrum}
    return [kinds[type(each)](each, x) for each in ours.all]


@functools.cache
def small_discriminators() -> Discriminators:
    rngs = nnx.Rngs(0)
    made = Discriminators((), (), rngs=rngs)
    made.all = nnx.List(
        [
            PeriodDiscriminator(2, (4, 8, 16), rngs=rngs),
            PeriodDiscriminator(5, (4, 8, 16), rngs=rngs),
            SpectrumDiscriminator(512, 4, rngs=rngs),
            SpectrumDiscriminator(256, 4, rngs=rngs),
        ]
    )
    return made


@pytest.mark.parametrize("samples", [16_000, 15_999])
def test_features_of_discriminators(samples: int) -> None:
    clip = two_clips()[0][..., :samples]
    ours = jax.jit(lambda model, x: model(x))(small_discriminators(), clip)
    theirs = torch_discriminators(small_discriminators(), torch.tensor(clip))
    for mine, other in zip(ours, theirs, strict=True):
        for features, expected in zip(mine, other, strict=True):
            expected = expected.detach().permute(0, 2, 3, 1).numpy()
            assert features.shape == expected.shape
            np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


Outputs = list[list[torch.Tensor]]


def torch_discriminator_loss(fake: Outputs, real: Outputs) -> torch.Tensor:
    return sum(f[-1].square().mean() + (1 - r[-1]).square().mean() for f, r in zip(fake, real, strict=True))


def torch_adversarial_loss(fake: Outputs, real: Outputs) -> torch.Tensor:
    return sum((1 - f[-1]).square().mean() for f in fake)


def torch_feature_loss(fake: Outputs, real: Outputs) -> torch.Tensor:
    pairs = [pair for f, r in zip(fake, real, strict=True) for pair in zip(f[:-1], r[:-1], strict=True)]
    return sum(functional.l1_loss(a, b.detach()) for a, b in pairs)


LOSSES = {
    "discriminator": (losses.discriminator_loss, torch_discriminator_loss),
    "adversarial": (lambda fake, real: losses.adversarial_loss(fake), torch_adversarial_loss),
    "feature": (losses.feature_loss, torch_feature_loss),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_discriminators(name: str) -> None:
    ours, theirs = LOSSES[name]
    model = small_discriminators()
    assert_same(
        lambda x, y: ours(model(x), model(y)),
        lambda x, y: theirs(torch_discriminators(model, x), torch_discriminators(model, y)),
        *two_clips(),
    )


def test_full_size_is_that_of_the_descript_audio_codec() -> None:
    """Of its layers' shapes: 1 x 32 x 5 ... 1024 x 1024 x 5, and five bands of five layers; counted by hand."""
    model = nnx.eval_shape(lambda: Discriminators(rngs=nnx.Rngs(0)))
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


def test_weight_norm() -> None:
    """Gradients by gains and directions are those of the reference with its weight norm; folding changes nothing."""
    _, model, speech = pair("no noise")
    normed = weight_norm.unfold(model)
    for ours, theirs in zip(jax.tree.leaves(weight_norm.fold(normed)), jax.tree.leaves(model), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=0)  # a division and a product in float32

    reference = snac.SNAC(**model.config.to_dict())
    reference.load_state_dict({name: torch.tensor(array) for name, array in to_torch(model).items()})
    part = speech[..., : 200 * model.config.pad_multiple]
    latents = np.asarray(model.audio_to_latents(part))
    rng = np.random.default_rng(0)
    by_latents, by_audio = rng.standard_normal(latents.shape, np.float32), rng.standard_normal(part.shape, np.float32)

    @jax.jit
    @jax.grad
    def gradients(normed: weight_norm.Normed) -> jax.Array:
        model = weight_norm.fold(normed)
        return (model.audio_to_latents(part) * by_latents).mean() + (model.latents_to_audio(latents) * by_audio).mean()

    encoded = reference.encoder(torch.tensor(part)).swapaxes(1, 2)
    decoded = reference.decoder(torch.tensor(latents).swapaxes(1, 2))
    loss = (encoded * torch.tensor(by_latents)).mean() + (decoded * torch.tensor(by_audio)).mean()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}

    ours = gradients(normed)
    tensors = [tensor for tensor in _tensors(ours.directions) if not tensor.name.startswith("quantizer")]
    assert len([tensor for tensor in tensors if tensor.weight_norm]) > 20
    for tensor in tensors:
        found = {tensor.name: tensor.to_torch(np.asarray(tensor.parameter[...]))}
        if tensor.weight_norm:
            parametrized = tensor.name.replace(".weight", ".parametrizations.weight.original")
            gain = np.asarray(ours.gains[tensor.name]).reshape(-1, 1, 1)
            found = {f"{parametrized}0": gain, f"{parametrized}1": found[tensor.name]}
        for name, gradient in found.items():
            size = expected[name].norm().item()
            assert gradient.shape == expected[name].shape
            assert size > 0
            assert np.linalg.norm(gradient - expected[name].numpy()) < GRADIENTS * size, name
