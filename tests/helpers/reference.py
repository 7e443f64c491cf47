"""The PyTorch reference with parameters that behave like trained ones, and its results beside ours.

Freshly initialised, SNAC is no test: its latents barely move and each level uses a handful of codes.
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
from convert.verify import AUDIO_BOUND, LATENTS_BOUND, decode_with_noise, recorded_noise
from snax.weights.torch_weights import from_torch, named_tensors

# Two codes whose distances, in float64, are this close relative to each other are a tie that rounding decides.
TIE = 1e-6

# With this seed the two rows nearest to any frame of the published architectures' test clips are at least 8e-5 apart
# (in float64, relative): rounding decides no token, on any machine. Seed 0 has a pair at 4e-6, where torch's float32
# picks the wrong one.
SEED = 1

# Of the norm of each parameter's gradient: float32 sums over thousands of samples, in another order than torch's.
GRADIENTS_BOUND = 1e-4


def trained_like(config: dict[str, Any], audio: np.ndarray, seed: int = SEED) -> snac.SNAC:
    """A reference whose every tensor is drawn anew, scaled so that `audio` comes out at an RMS of 0.15.

    Each level's projections are the principal directions of what is left of `audio` there, whitened, so that a
    normal codebook covers it.
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


def assert_alive(reference: snac.SNAC, audio: np.ndarray) -> None:
    """`reference` on `audio` behaves like a trained model, so that equality with it means something."""
    with torch.inference_mode():
        decoded, codes = reference(torch.from_numpy(audio))
    assert 0.02 < decoded.square().mean().sqrt() < 0.7
    assert (decoded.abs() > 0.99).float().mean() < 0.01, "the tanh clips"
    for level in codes:
        assert len(level.unique()) > 0.4 * min(level.numel(), reference.codebook_size), "a level uses few codes"


def converted(reference: snac.SNAC, config: dict[str, Any]) -> snax.SNAC:
    return from_torch(numpy_state_dict(reference), snax.SNACConfig.from_dict(config))


def numpy_state_dict(reference: snac.SNAC) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in reference.state_dict().items()}


def own_rounding(reference: snac.SNAC, audio: np.ndarray) -> float:
    """How far the reference's latents in float32 are from those in float64 at most, over their RMS."""
    with torch.inference_mode():
        samples = reference.preprocess(torch.from_numpy(audio))
        latents, exact = reference.encoder(samples), in_float64(reference).encoder(samples.double())
    return ((latents - exact).abs().max() / exact.square().mean().sqrt()).item()


def assert_same(
    reference: snac.SNAC, model: snax.SNAC, audio: np.ndarray, latents_bound: float = LATENTS_BOUND
) -> None:
    """Latents, every token, quantized latents and decoded audio of `model` are the reference's.

    Latents are those of the reference in float64: its float32 is itself up to 1.1e-5 off them on a click.
    """
    with torch.inference_mode(), recorded_noise() as noise:
        exact = in_float64(reference)
        latents = exact.encoder(exact.preprocess(torch.from_numpy(audio).double()))
        codes = reference.encode(torch.from_numpy(audio))
        dequantized = reference.quantizer.from_codes(codes)
        decoded = reference.decode(codes)
        _assert_same_tokens(exact, latents, model.encode(audio), codes)
    _assert_close(model.audio_to_latents(audio), latents, latents_bound)
    our_quantized, our_codes = model.quantize(latents.float().swapaxes(1, 2).numpy())
    with torch.inference_mode():
        _assert_same_tokens(exact, latents, our_codes, reference.quantizer(latents.float())[1])
        _assert_close(our_quantized, reference.quantizer.from_codes([torch.tensor(np.asarray(c)) for c in our_codes]))
    our_dequantized = model.dequantize([level.numpy() for level in codes])
    _assert_close(our_dequantized, dequantized)
    ours = decode_with_noise(model, our_dequantized, noise or None)
    assert ours.shape == decoded.shape
    np.testing.assert_allclose(ours, decoded, rtol=0, atol=AUDIO_BOUND)


def assert_same_codes(reference: snac.SNAC, clip: np.ndarray, ours: list[np.ndarray]) -> None:
    """`ours`, for each level (frames,), are the reference's codes of a clip (samples,) of whole pad multiples."""
    audio = torch.from_numpy(clip)[None, None]
    with torch.inference_mode():
        theirs = reference.encode(audio)
        if all(np.array_equal(a, b[0]) for a, b in zip(ours, theirs, strict=True)):
            return
        exact = in_float64(reference)
        latents = exact.encoder(exact.preprocess(audio.double()))
        _assert_same_tokens(exact, latents, [level[None] for level in ours], theirs)


@functools.lru_cache(maxsize=1)
def in_float64(reference: snac.SNAC) -> snac.SNAC:
    """The reference without its own rounding."""
    return copy.deepcopy(reference).double()


def without_weight_norm(reference: snac.SNAC, config: snax.SNACConfig) -> snac.SNAC:
    """The same function with plain weights; not made of a copy, with which it would share the classes changed here."""
    plain = snac.SNAC(**config.to_dict()).eval()
    plain.load_state_dict(reference.state_dict())
    for module in plain.modules():
        if nn.utils.parametrize.is_parametrized(module):
            nn.utils.parametrize.remove_parametrizations(module, "weight")
    return plain


def _assert_close(ours: jax.Array, expected: torch.Tensor, bound: float = LATENTS_BOUND) -> None:
    rms = expected.square().mean().sqrt().item()
    np.testing.assert_allclose(ours, expected.swapaxes(1, 2), rtol=0, atol=bound * rms)


def _assert_same_tokens(
    exact: snac.SNAC, latents: torch.Tensor, ours: Sequence[jax.Array | np.ndarray], theirs: list[torch.Tensor]
) -> None:
    """Every token is the reference's. Where one is not, ours is the nearer one in float64 or a tie; it is printed.

    The finer levels then quantize another residual than the reference's: there, ours must be the nearest to it.
    """
    residual, astray = latents, torch.zeros_like(latents[:, 0], dtype=torch.bool)
    for i, quantizer in enumerate(exact.quantizer.quantizers):
        our_level = torch.tensor(np.asarray(ours[i])).long()
        assert our_level.shape == theirs[i].shape
        differs = our_level != theirs[i]
        pooled = nn.functional.avg_pool1d(residual, quantizer.stride, quantizer.stride)
        vectors = nn.functional.normalize(quantizer.in_proj(pooled), dim=1).swapaxes(1, 2)
        distances = torch.cdist(vectors, nn.functional.normalize(quantizer.codebook.weight)[None]).square()
        level_astray = astray.unflatten(1, (-1, quantizer.stride)).any(2)
        for row, frame in differs.nonzero().tolist():
            mine = distances[row, frame, our_level[row, frame]]
            best = (
                distances[row, frame].min()
                if level_astray[row, frame]
                else distances[row, frame, theirs[i][row, frame]]
            )
            print(f"level {i}, row {row}, frame {frame}: a tie? distance {mine}, the reference's {best}")
            assert mine - best < TIE * best, f"level {i}, row {row}, frame {frame}: {mine} is no tie with {best}"
        astray |= differs.repeat_interleave(quantizer.stride, dim=1)
        level = quantizer.out_proj(quantizer.decode_code(our_level))
        residual = residual - level.repeat_interleave(quantizer.stride, dim=-1)


def assert_same_gradients(reference: snac.SNAC, model: snax.SNAC, audio: np.ndarray) -> None:
    """Gradients of one scalar loss on the round trip and on decoded codes, by audio and by every parameter."""
    plain = without_weight_norm(reference, model.config)  # ours has no gain and direction, so neither may theirs
    weights = np.random.default_rng(0).standard_normal(audio.shape, np.float32)
    torch_audio = torch.from_numpy(audio).requires_grad_()
    with recorded_noise() as noise:
        decoded, codes = plain(torch_audio)
    dequantized = plain.quantizer.from_codes(codes)
    loss = (decoded * torch.from_numpy(weights)).mean() + dequantized.square().mean()
    loss.backward()

    def our_loss(model: snax.SNAC, audio: jax.Array) -> jax.Array:
        quantized, codes = model.quantize(model.audio_to_latents(audio))
        decoded = decode_with_noise(model, quantized, noise or None)[..., : audio.shape[-1]]
        return (decoded * weights).mean() + jnp.square(model.dequantize(codes)).mean()

    ours, (gradients, audio_gradient) = jax.jit(jax.value_and_grad(our_loss, argnums=(0, 1)))(model, audio)
    assert float(ours) == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: tensor.grad for name, tensor in plain.named_parameters()} | {"audio": torch_audio.grad}
    found = {tensor.name: tensor.to_torch(np.asarray(tensor.parameter[...])) for tensor in named_tensors(gradients)}
    found["audio"] = np.asarray(audio_gradient)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = expected[name].norm().item()
        assert size > 0, f"{name} has no gradient in the reference: nothing is tested"
        difference = np.linalg.norm(gradient - expected[name].numpy()) / size
        assert difference < GRADIENTS_BOUND, f"gradient of {name}: {difference:.1e} off"
