"""The mapping of names, both ways, and what it refuses."""

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
    """In the reference, to rounding."""
    again = snac.SNAC(**ATTENTIVE).eval()
    again.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()})
    audio = torch.from_numpy(small.audio())
    with torch.inference_mode():
        expected, latents = (model.encoder(model.preprocess(audio)) for model in (torch_model, again))
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5 * expected.std().item())
        for noise in (0, 1):
            torch.manual_seed(noise)
            decoded = again.decode(again.encode(audio))
            torch.manual_seed(noise)
            torch.testing.assert_close(decoded, torch_model.decode(torch_model.encode(audio)), rtol=0, atol=5e-6)


def test_to_flax_and_back(torch_model: snac.SNAC, state_dict: dict[str, np.ndarray]) -> None:
    assert_same_function(to_torch(from_torch(state_dict, CONFIG)), torch_model)


def test_back_again_changes_nothing(state_dict: dict[str, np.ndarray]) -> None:
    once = to_torch(from_torch(state_dict, CONFIG))
    twice = to_torch(from_torch(once, CONFIG))
    for name, array in once.items():
        np.testing.assert_allclose(twice[name], array, rtol=2e-7)  # one rounding of the gain over the norm


def test_older_names(torch_model: snac.SNAC, state_dict: dict[str, np.ndarray]) -> None:
    older = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): array
        for name, array in state_dict.items()
    }
    assert older.keys() != state_dict.keys()
    assert_same_function(to_torch(from_torch(older, CONFIG)), torch_model)


def test_half_precision_files(state_dict: dict[str, np.ndarray]) -> None:
    halves = {name: array.astype(np.float16) for name, array in state_dict.items()}
    model = from_torch(halves, CONFIG)
    assert model.dtype == np.float32
    np.testing.assert_array_equal(
        model.quantizer.quantizers[0].codebook[...], halves["quantizer.quantizers.0.codebook.weight"]
    )


def test_channel_that_is_all_zeros(torch_model: snac.SNAC, state_dict: dict[str, np.ndarray]) -> None:
    state_dict["encoder.block.0.parametrizations.weight.original0"] = gain = state_dict[
        "encoder.block.0.parametrizations.weight.original0"
    ].copy()
    gain[3] = 0
    back = to_torch(from_torch(state_dict, CONFIG))
    assert back["encoder.block.0.parametrizations.weight.original0"][3] == 0
    silenced = snac.SNAC(**ATTENTIVE).eval()
    silenced.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()})
    assert_same_function(back, silenced)


def test_negative_gain(torch_model: snac.SNAC, state_dict: dict[str, np.ndarray]) -> None:
    for part in ("original0", "original1"):
        name = f"decoder.model.1.parametrizations.weight.{part}"
        state_dict[name] = -state_dict[name]
    assert_same_function(to_torch(from_torch(state_dict, CONFIG)), torch_model)


def test_all_differences_in_one_error(state_dict: dict[str, np.ndarray]) -> None:
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
        "of no length, so without a direction: encoder.block.0.parametrizations.weight.original1",
        "not rotary frequencies of theta 10000: encoder.block.3.rel_pos.inv_freq",
    ]:
        assert line in str(error.value)


@pytest.mark.parametrize(
    "change",
    [{"codebook_size": 32}, {"noise": False}, {"depthwise": False}, {"attn_window_size": None}, {"vq_strides": [2, 1]}],
)
def test_weights_of_another_configuration(state_dict: dict[str, np.ndarray], change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not the weights of this configuration, \d+ differences"):
        from_torch(state_dict, snax.SNACConfig.from_dict(ATTENTIVE | change))
