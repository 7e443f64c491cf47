"""The three published architectures at full size against the reference, on every kind of audio.

With drawn parameters always; marked `pretrained`, with the published ones, where they can be had.
"""

import functools
from unittest import mock

import audio
import jax
import numpy as np
import pytest
import reference
import snac
import torch

import snax
from convert.verify import AUDIO_BOUND
from snax.config import PUBLISHED_CONFIGS
from snax.pretrained import download
from snax.torch_weights import to_torch

NAMES = list(PUBLISHED_CONFIGS)
KINDS = list(audio.kinds(8000, 8))


@functools.cache
def drawn(name: str) -> tuple[snac.SNAC, snax.SNAC]:
    config = PUBLISHED_CONFIGS[name].to_dict()
    speech = audio.clip("speech_7s.wav", config["sampling_rate"], 4)
    torch_model = reference.trained_like(config, speech)
    reference.assert_alive(torch_model, speech)
    return torch_model, reference.converted(torch_model, config)


@functools.cache
def published(name: str) -> tuple[snac.SNAC, snax.SNAC]:
    weights_path, _ = download(name)
    torch_model = snac.SNAC.from_pretrained(str(weights_path.parent))
    return torch_model, snax.load(name)


@functools.cache
def clips(name: str) -> dict[str, np.ndarray]:
    config = PUBLISHED_CONFIGS[name]
    return audio.kinds(config.sampling_rate, config.pad_multiple)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_drawn_parameters(name: str, kind: str) -> None:
    reference.assert_same(*drawn(name), clips(name)[kind])


@pytest.mark.pretrained
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_published_parameters(name: str, kind: str) -> None:
    reference.assert_same(*published(name), clips(name)[kind])


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str) -> None:
    # On reconstructed audio the reference's forward differs from ours in the noise alone; without it they are equal.
    torch_model, model = drawn(name)
    speech = clips(name)["speech"]
    zeros = mock.patch.object(torch, "randn", lambda shape, **kwargs: torch.zeros(shape))
    with torch.inference_mode(), zeros:
        expected, expected_codes = torch_model(torch.from_numpy(speech))
    decoded, codes = model(speech)
    for ours, theirs in zip(codes, expected_codes, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=AUDIO_BOUND)


@pytest.mark.parametrize(("name", "tensors"), [("snac_24khz", 269), ("snac_32khz", 286), ("snac_44khz", 286)])
def test_state_dict_is_complete(name: str, tensors: int) -> None:
    torch_model, model = drawn(name)
    expected = {key: tuple(tensor.shape) for key, tensor in torch_model.state_dict().items()}
    assert len(expected) == tensors
    assert {key: array.shape for key, array in to_torch(model).items()} == expected


@pytest.mark.parametrize(("name", "parameters"), [("snac_24khz", 19_842_914), ("snac_32khz", 54_546_338)])
def test_number_of_parameters(name: str, parameters: int) -> None:
    # The reference counts a gain beside each direction; ours are multiplied out.
    torch_model, model = drawn(name)
    gains = sum(p.numel() for key, p in torch_model.named_parameters() if key.endswith("original0"))
    assert sum(p.numel() for p in torch_model.parameters()) == parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters - gains
