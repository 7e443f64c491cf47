"""Conversion of the reference's state dict in both directions, and rejection of invalid state dicts."""

from typing import Any

import numpy as np
import pytest
import snac
import torch
from helpers import reference, small

import snax
from snax.weights.torch_weights import from_torch, to_torch

ATTENTIVE = small.CONFIG.to_dict() | {"latent_dim": None, "encoder_dim": 16, "decoder_dim": 64, "attn_window_size": 8}


@pytest.fixture(scope="module")
def torch_model() -> snac.SNAC:
    return reference.trained_like(ATTENTIVE, small.audio(samples=64 * 40))


@pytest.fixture
def state_dict(torch_model: snac.SNAC) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in torch_model.state_dict().items()}


CONFIG = snax.SNACConfig.from_dict(ATTENTIVE)


def assert_same_function(state_dict: dict[str, np.ndarray], torch_model: snac.SNAC) -> None:
    """Check that both compute the same function in the reference, up to rounding."""
    converted = snac.SNAC(**ATTENTIVE).eval()
    converted.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()})
    audio = torch.from_numpy(small.audio())
    with torch.inference_mode():
        expected, latents = (model.encoder(model.preprocess(audio)) for model in (torch_model, converted))
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * expected.std().item())
        for noise in (0, 1):
            torch.manual_seed(noise)
            decoded = converted.decode(converted.encode(audio))
            torch.manual_seed(noise)
            torch.testing.assert_close(decoded, torch_model.decode(torch_model.encode(audio)), rtol=0, atol=5e-6)


def test_round_trip(torch_model: snac.SNAC, state_dict: dict[str, np.ndarray]) -> None:
    assert_same_function(to_torch(from_torch(state_dict, CONFIG)), torch_model)


def test_second_round_trip_changes_nothing(state_dict: dict[str, np.ndarray]) -> None:
    once = to_torch(from_torch(state_dict, CONFIG))
    twice = to_torch(from_torch(once, CONFIG))
    for name, array in once.items():
        np.testing.assert_allclose(twice[name], array, rtol=2e-7)  # one rounding of g / |v|


def test_legacy_weight_norm_names(torch_model: snac.SNAC, state_dict: dict[str, np.ndarray]) -> None:
    legacy = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): array
        for name, array in state_dict.items()
    }
    assert legacy.keys() != state_dict.keys()
    assert_same_function(to_torch(from_torch(legacy, CONFIG)), torch_model)


def test_float16_weights(state_dict: dict[str, np.ndarray]) -> None:
    float16 = {name: array.astype(np.float16) for name, array in state_dict.items()}
    model = from_torch(float16, CONFIG)
    assert model.dtype == np.float32
    np.testing.assert_array_equal(
        model.quantizer.quantizers[0].codebook[...], float16["quantizer.quantizers.0.codebook.weight"]
    )


def test_channel_of_zeros(torch_model: snac.SNAC, state_dict: dict[str, np.ndarray]) -> None:
    state_dict["encoder.block.0.parametrizations.weight.original0"] = g = state_dict[
        "encoder.block.0.parametrizations.weight.original0"
    ].copy()
    g[3] = 0
    round_trip = to_torch(from_torch(state_dict, CONFIG))
    assert round_trip["encoder.block.0.parametrizations.weight.original0"][3] == 0
    expected = snac.SNAC(**ATTENTIVE).eval()
    expected.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()})
    assert_same_function(round_trip, expected)


def test_negative_g(torch_model: snac.SNAC, state_dict: dict[str, np.ndarray]) -> None:
    for part in ("original0", "original1"):
        name = f"decoder.model.1.parametrizations.weight.{part}"
        state_dict[name] = -state_dict[name]
    assert_same_function(to_torch(from_torch(state_dict, CONFIG)), torch_model)


def test_reports_all_problems_at_once(state_dict: dict[str, np.ndarray]) -> None:
    del state_dict["encoder.block.1.block.3.alpha"]
    del state_dict["decoder.model.0.parametrizations.weight.original0"]
    state_dict["quantizer.quantizers.3.codebook.weight"] = np.zeros((64, 8), np.float32)
    state_dict["encoder.block.0.bias"] = np.zeros(9, np.float32)
    state_dict["decoder.model.2.to_out.weight"] = np.full_like(state_dict["decoder.model.2.to_out.weight"], np.nan)
    state_dict["encoder.block.0.parametrizations.weight.original1"] = np.zeros((16, 1, 7), np.float32)
    state_dict["encoder.block.3.rel_pos.inv_freq"] = np.ones(32, np.float32)
    with pytest.raises(ValueError, match="7 differences") as error:
        from_torch(state_dict, CONFIG)
    for line in [
        "missing: encoder.block.1.block.3.alpha",
        "missing: decoder.model.0.parametrizations.weight.original0",
        "unexpected: quantizer.quantizers.3.codebook.weight (64, 8)",
        "mis-shaped: encoder.block.0.bias (9,), expected (16,)",
        "not finite: decoder.model.2.to_out.weight",
        "norm of zero in weight normalization: encoder.block.0.parametrizations.weight.original1",
        "not the rotary frequencies of theta = 10000: encoder.block.3.rel_pos.inv_freq",
    ]:
        assert line in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"codebook_size": 32}, {"noise": False}, {"depthwise": False}, {"attn_window_size": None}, {"vq_strides": [2, 1]}],
)
def test_rejects_weights_of_another_configuration(state_dict: dict[str, np.ndarray], change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"The weights do not match the configuration \(\d+ differences\)"):
        from_torch(state_dict, snax.SNACConfig.from_dict(ATTENTIVE | change))
