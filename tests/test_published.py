"""Parity of full-size models with the reference, on different kinds of audio.

The models are the three published architectures with random parameters, and the trained model that is bundled with
snax. Tests marked `pretrained` download the published parameters.
"""

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import snac
import torch
from helpers import recordings, reference
from helpers.pairs import torch_decode, torch_encode

import snax
from snax.codec.config import PUBLISHED_CONFIGS
from snax.weights import torch_files
from snax.weights.pretrained import download
from snax.weights.torch_weights import to_torch
from snax.weights.verification import AUDIO_BOUND, LATENTS_BOUND, ROUNDING_FACTOR

KINDS = list(recordings.kinds(8000, 8))


@pytest.fixture(
    scope="module",
    params=[
        "snac_24khz",
        pytest.param("snac_32khz", marks=pytest.mark.slow),
        pytest.param("snac_44khz", marks=pytest.mark.slow),
        pytest.param("mini_16khz", marks=pytest.mark.slow),
    ],
)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the model. pytest groups the tests by it, so only one model is in memory."""
    yield request.param
    for cached in (random_pair, models, clips):
        cached.cache_clear()
    jax.clear_caches()


@functools.cache
def random_pair(name: str) -> tuple[snac.SNAC, snax.SNAC]:
    config = PUBLISHED_CONFIGS[name].to_dict()
    speech = recordings.clip("speech_7s.wav", config["sampling_rate"], 4)
    torch_model = reference.trained_like(config, speech)
    reference.assert_behaves_trained(torch_model, speech)
    return torch_model, reference.converted(torch_model, config)


@functools.cache
def models(name: str) -> tuple[snac.SNAC, snax.SNAC]:
    """Random parameters, or the bundled ones, which the reference loads from an exported checkpoint."""
    if name in PUBLISHED_CONFIGS:
        return random_pair(name)
    model = snax.load(name)
    with tempfile.TemporaryDirectory() as folder:
        torch_files.write_folder(model, Path(folder, name))
        return snac.SNAC.from_pretrained(f"{folder}/{name}").eval(), model


@functools.cache
def published(name: str) -> tuple[snac.SNAC, snax.SNAC]:
    weights_path, _ = download(name)
    torch_model = snac.SNAC.from_pretrained(str(weights_path.parent))
    return torch_model, snax.load(name)


@functools.cache
def clips(name: str) -> dict[str, np.ndarray]:
    config = models(name)[1].config
    return recordings.kinds(config.sampling_rate, config.pad_multiple)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_audio(name: str, kind: str) -> None:
    torch_model, model = models(name)
    bound = LATENTS_BOUND
    if name not in PUBLISHED_CONFIGS:
        # On speech and drums, the largest error of the reference's float32 latents is 2.7e-5, that of snax is 2.1e-5.
        bound = trained_bound(torch_model, clips(name)[kind])
    reference.assert_same(torch_model, model, clips(name)[kind], bound)


def trained_bound(torch_model: snac.SNAC, audio: np.ndarray) -> float:
    """Return the error bound of a trained model's latents. Trained encoders magnify rounding errors."""
    return max(LATENTS_BOUND, ROUNDING_FACTOR * reference.rounding_error(torch_model, audio))


def test_packing_and_streaming_match_reference(name: str) -> None:
    torch_model, model = models(name)
    pad, rate = model.config.pad_multiple, model.config.sampling_rate
    inputs = [
        recordings.clip("speech_3s.wav", rate, 3)[0, 0],
        recordings.clip("guit_em9.flac", rate, 1.3)[0, 0],
        np.ones(1),
    ]
    expected = [torch_encode(torch_model, clip.astype(np.float32), pad) for clip in inputs]
    expected_audio = [torch_decode(torch_model, codes) for codes in expected]

    encoded = list(snax.encode_many(model, inputs, row_seconds=4.0))
    decoded = snax.decode_many(model, encoded, row_seconds=4.0)
    for clip, codes, encoded_clip, audio, whole in zip(inputs, expected, encoded, decoded, expected_audio, strict=True):
        jax.tree.map(np.testing.assert_array_equal, encoded_clip, snax.EncodedClip(tuple(codes), len(clip)))
        np.testing.assert_allclose(audio, whole[: len(clip)], rtol=0, atol=AUDIO_BOUND)

    encoder, decoder = snax.StreamEncoder(model), snax.StreamDecoder(model)
    state, codes = encoder.step(encoder.init_state(), inputs[1][None, None, :-5])
    state, more_codes = encoder.step(state, inputs[1][None, None, -5:])
    streamed = [np.concatenate(level, axis=1) for level in zip(codes, more_codes, encoder.flush(state), strict=True)]
    jax.tree.map(np.testing.assert_array_equal, [level[0] for level in streamed], expected[1])
    state, audio = decoder.step(decoder.init_state(), streamed)
    audio = np.concatenate([audio, decoder.flush(state)], axis=2)[0, 0]
    np.testing.assert_allclose(audio, expected_audio[1], rtol=0, atol=AUDIO_BOUND)
    if name == "snac_24khz":
        assert 9 * model.config.hop_length < decoder.latency <= 10 * model.config.hop_length


@pytest.mark.pretrained
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_published_parameters(name: str, kind: str) -> None:
    torch_model, model = published(name)
    audio = clips(name)[kind]
    reference.assert_same(torch_model, model, audio, trained_bound(torch_model, audio))


def test_round_trip(name: str) -> None:
    # Without noise, the reference's forward pass equals the round trip of snax.
    torch_model, model = models(name)
    speech = clips(name)["speech"]
    zeros = mock.patch.object(torch, "randn", lambda shape, **kwargs: torch.zeros(shape))
    with torch.inference_mode(), zeros:
        expected, expected_codes = torch_model(torch.from_numpy(speech))
    decoded, codes = model(speech)
    for level, expected_level in zip(codes, expected_codes, strict=True):
        np.testing.assert_array_equal(level, expected_level)
    np.testing.assert_allclose(decoded, expected, rtol=0, atol=AUDIO_BOUND)


def untrained(name: str) -> tuple[snac.SNAC, snax.SNAC]:
    config = PUBLISHED_CONFIGS[name].to_dict()
    torch_model = snac.SNAC(**config)
    return torch_model, reference.converted(torch_model, config)


@pytest.mark.parametrize(("name", "tensors"), [("snac_24khz", 269), ("snac_32khz", 286), ("snac_44khz", 286)])
def test_state_dict_is_complete(name: str, tensors: int) -> None:
    torch_model, model = untrained(name)
    expected = {key: tuple(tensor.shape) for key, tensor in torch_model.state_dict().items()}
    assert len(expected) == tensors
    assert {key: array.shape for key, array in to_torch(model).items()} == expected


@pytest.mark.parametrize(("name", "parameters"), [("snac_24khz", 19_842_914), ("snac_32khz", 54_546_338)])
def test_number_of_parameters(name: str, parameters: int) -> None:
    # The weight norm of the reference has gains in addition to the directions.
    torch_model, model = untrained(name)
    gains = sum(p.numel() for key, p in torch_model.named_parameters() if key.endswith("original0"))
    assert sum(p.numel() for p in torch_model.parameters()) == parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters - gains
