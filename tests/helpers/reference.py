"""The PyTorch reference with parameters that behave like trained ones, and comparisons of its results with snax.

A freshly initialized SNAC is not a good test: its latents are almost constant, and each level uses few codes.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import snac
import torch
from torch import nn

import snax
from snax.weights.torch_weights import from_torch, named_tensors
from snax.weights.verification import AUDIO_BOUND, LATENTS_BOUND, decode_with_noise, recorded_noise

# Two codes are a tie, which rounding decides, if the relative difference of their distances in float64 is below this.
TIE = 1e-6

# With this seed, rounding does not decide any token of the published architectures' test clips, on any machine: the
# distances of the two nearest codes differ by at least 8e-5 (relative, in float64). With seed 0 one pair differs by
# 4e-6, and torch's float32 picks the wrong code.
SEED = 1

# Relative to the norm of each gradient: float32 sums over thousands of samples, in a different order than in torch.
GRADIENTS_BOUND = 1e-4


def trained_like(config: dict[str, Any], audio: np.ndarray, seed: int = SEED) -> snac.SNAC:
    """Return a reference model with random parameters, scaled to decode `audio` with an RMS of 0.15.

    The projections of each level whiten the residual of `audio` along its principal directions, so that a codebook with
    normally distributed entries covers it.
    """
    torch.manual_seed(seed)
    model = snac.SNAC(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if name.endswith(".alpha"):
                parameter.copy_(torch.exp(0.5 * noise))
            elif name.endswith("original0"):
                parameter.mul_(0.8 + 0.6 * torch.rand_like(parameter))
            elif name.endswith("codebook.weight"):
                parameter.copy_(noise)
            elif name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.05 * noise)
        latents = residual = model.encoder(model.preprocess(torch.from_numpy(audio)))
        for quantizer in model.quantizer.quantizers:
            _whiten(quantizer, residual)
            residual = residual - quantizer(residual)[0]
        before_tanh = model.decoder.model[:-1](latents - residual)
        scale = 0.15 / before_tanh.std()
        last = model.decoder.model[-2]
        last.parametrizations.weight.original0.mul_(scale)
        last.bias.sub_(before_tanh.mean()).mul_(scale)
    return model


def _whiten(quantizer: nn.Module, residual: torch.Tensor) -> None:
    pooled = nn.functional.avg_pool1d(residual, quantizer.stride, quantizer.stride)
    vectors = pooled.swapaxes(0, 1).flatten(1)
    mean = vectors.mean(1, keepdim=True)
    directions, scales, _ = torch.linalg.svd(vectors - mean, full_matrices=False)
    dim = quantizer.codebook_dim
    directions, scales = directions[:, :dim], scales[:dim] / vectors.shape[1] ** 0.5
    project = directions.T / scales[:, None]
    quantizer.in_proj.weight = project[..., None]
    quantizer.in_proj.bias.copy_(-(project @ mean)[:, 0])
    quantizer.out_proj.weight = (directions * scales)[..., None]
    quantizer.out_proj.bias.copy_(mean[:, 0])


def assert_behaves_trained(reference: snac.SNAC, audio: np.ndarray) -> None:
    """Check that `reference` uses its codebooks and output range, so that equality with it is a meaningful test."""
    with torch.inference_mode():
        decoded, codes = reference(torch.from_numpy(audio))
    assert 0.02 < decoded.square().mean().sqrt() < 0.7
    assert (decoded.abs() > 0.99).float().mean() < 0.01, "the output saturates"
    for level in codes:
        assert len(level.unique()) > 0.4 * min(level.numel(), reference.codebook_size), "a level uses too few codes"


def converted(reference: snac.SNAC, config: dict[str, Any]) -> snax.SNAC:
    return from_torch(numpy_state_dict(reference), snax.SNACConfig.from_dict(config))


def numpy_state_dict(reference: snac.SNAC) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in reference.state_dict().items()}


def rounding_error(reference: snac.SNAC, audio: np.ndarray) -> float:
    """Return the largest error of the reference's float32 latents, relative to the RMS of its float64 latents."""
    with torch.inference_mode():
        samples = reference.preprocess(torch.from_numpy(audio))
        latents, exact = reference.encoder(samples), in_float64(reference).encoder(samples.double())
    return ((latents - exact).abs().max() / exact.square().mean().sqrt()).item()


def assert_same(
    reference: snac.SNAC, model: snax.SNAC, audio: np.ndarray, latents_bound: float = LATENTS_BOUND
) -> None:
    """Check that latents, all tokens, quantized latents and decoded audio of `model` equal the reference's.

    Latents are compared with the reference in float64, because its float32 latents are off by up to 1.1e-5 on a click.
    """
    with torch.inference_mode(), recorded_noise() as noise:
        exact = in_float64(reference)
        latents = exact.encoder(exact.preprocess(torch.from_numpy(audio).double()))
        codes = reference.encode(torch.from_numpy(audio))
        dequantized = reference.quantizer.from_codes(codes)
        decoded = reference.decode(codes)
        _assert_same_tokens(exact, latents, model.encode(audio), codes)
    _assert_close(model.audio_to_latents(audio), latents, latents_bound)
    quantized, codes_of_latents = model.quantize(latents.float().swapaxes(1, 2).numpy())
    with torch.inference_mode():
        _assert_same_tokens(exact, latents, codes_of_latents, reference.quantizer(latents.float())[1])
        expected_quantized = reference.quantizer.from_codes([torch.tensor(np.asarray(x)) for x in codes_of_latents])
        _assert_close(quantized, expected_quantized)
    latents_of_codes = model.dequantize([level.numpy() for level in codes])
    _assert_close(latents_of_codes, dequantized)
    audio_of_codes = decode_with_noise(model, latents_of_codes, noise or None)
    assert audio_of_codes.shape == decoded.shape
    np.testing.assert_allclose(audio_of_codes, decoded, rtol=0, atol=AUDIO_BOUND)


def assert_same_codes(reference: snac.SNAC, clip: np.ndarray, codes: list[np.ndarray]) -> None:
    """Check that `codes`, (frames,) per level, equal the reference's for a (samples,) clip of whole pad multiples."""
    audio = torch.from_numpy(clip)[None, None]
    with torch.inference_mode():
        expected = reference.encode(audio)
        if all(np.array_equal(a, b[0]) for a, b in zip(codes, expected, strict=True)):
            return
        exact = in_float64(reference)
        latents = exact.encoder(exact.preprocess(audio.double()))
        _assert_same_tokens(exact, latents, [level[None] for level in codes], expected)


@functools.lru_cache(maxsize=1)
def in_float64(reference: snac.SNAC) -> snac.SNAC:
    """Return a float64 copy of the reference."""
    return copy.deepcopy(reference).double()


def without_weight_norm(reference: snac.SNAC, config: snax.SNACConfig) -> snac.SNAC:
    """Return the same function with plain weights. A deep copy would share the classes that torch changes here."""
    plain = snac.SNAC(**config.to_dict()).eval()
    plain.load_state_dict(reference.state_dict())
    for module in plain.modules():
        if nn.utils.parametrize.is_parametrized(module):
            nn.utils.parametrize.remove_parametrizations(module, "weight")
    return plain


def _assert_close(actual: jax.Array, expected: torch.Tensor, bound: float = LATENTS_BOUND) -> None:
    rms = expected.square().mean().sqrt().item()
    np.testing.assert_allclose(actual, expected.swapaxes(1, 2), rtol=0, atol=bound * rms)


def _assert_same_tokens(
    exact: snac.SNAC, latents: torch.Tensor, codes: Sequence[jax.Array | np.ndarray], expected: list[torch.Tensor]
) -> None:
    """Check that all tokens equal the reference's, except for ties, and tokens that are nearer in float64.

    After such a token, finer levels quantize a different residual than the reference. There, the tokens must be the
    nearest to this residual.
    """
    residual, diverged = latents, torch.zeros_like(latents[:, 0], dtype=torch.bool)
    for i, quantizer in enumerate(exact.quantizer.quantizers):
        level_codes = torch.tensor(np.asarray(codes[i])).long()
        assert level_codes.shape == expected[i].shape
        differs = level_codes != expected[i]
        pooled = nn.functional.avg_pool1d(residual, quantizer.stride, quantizer.stride)
        vectors = nn.functional.normalize(quantizer.in_proj(pooled), dim=1).swapaxes(1, 2)
        distances = torch.cdist(vectors, nn.functional.normalize(quantizer.codebook.weight)[None]).square()
        level_diverged = diverged.unflatten(1, (-1, quantizer.stride)).any(2)
        for row, frame in differs.nonzero().tolist():
            distance = distances[row, frame, level_codes[row, frame]]
            best = (
                distances[row, frame].min()
                if level_diverged[row, frame]
                else distances[row, frame, expected[i][row, frame]]
            )
            print(f"level {i}, row {row}, frame {frame}: distance {distance}, the reference's {best}")
            assert distance - best < TIE * best, (
                f"level {i}, row {row}, frame {frame}: {distance} is not a tie with {best}"
            )
        diverged |= differs.repeat_interleave(quantizer.stride, dim=1)
        level = quantizer.out_proj(quantizer.decode_code(level_codes))
        residual = residual - level.repeat_interleave(quantizer.stride, dim=-1)


def assert_same_gradients(reference: snac.SNAC, model: snax.SNAC, audio: np.ndarray) -> None:
    """Check the gradients of a loss on the round trip and on dequantized codes, for the audio and all parameters."""
    # snax has no weight norm here, so the reference must not have it either.
    plain = without_weight_norm(reference, model.config)
    weights = np.random.default_rng(0).standard_normal(audio.shape, np.float32)
    torch_audio = torch.from_numpy(audio).requires_grad_()
    with recorded_noise() as noise:
        decoded, codes = plain(torch_audio)
    dequantized = plain.quantizer.from_codes(codes)
    loss = (decoded * torch.from_numpy(weights)).mean() + dequantized.square().mean()
    loss.backward()

    def loss_fn(model: snax.SNAC, audio: jax.Array) -> jax.Array:
        quantized, codes = model.quantize(model.audio_to_latents(audio))
        decoded = decode_with_noise(model, quantized, noise or None)[..., : audio.shape[-1]]
        return (decoded * weights).mean() + jnp.square(model.dequantize(codes)).mean()

    value, (gradients, audio_gradient) = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)))(model, audio)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: tensor.grad for name, tensor in plain.named_parameters()} | {"audio": torch_audio.grad}
    actual = {tensor.name: tensor.to_torch(np.asarray(tensor.parameter[...])) for tensor in named_tensors(gradients)}
    actual["audio"] = np.asarray(audio_gradient)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        size = expected[name].norm().item()
        assert size > 0, f"the reference has a zero gradient for {name}"
        difference = np.linalg.norm(gradient - expected[name].numpy()) / size
        assert difference < GRADIENTS_BOUND, f"gradient of {name} is off by {difference:.1e}"
