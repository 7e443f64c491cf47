"""Validation and derived properties of `SNACConfig`."""

import dataclasses
import json
from typing import Any

import jax
import pytest
import snac
import torch
from flax import nnx
from helpers import small

import snax
from snax.codec.config import PUBLISHED_CONFIGS, strided_length

# The published config.json of snac_24khz.
HUB_CONFIG = """{
    "sampling_rate": 24000, "encoder_dim": 48, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 1024,
    "decoder_rates": [8, 8, 4, 2], "attn_window_size": null, "codebook_size": 4096, "codebook_dim": 8,
    "vq_strides": [4, 2, 1], "noise": true, "depthwise": true
}"""


def test_hub_config() -> None:
    assert snax.SNACConfig.from_dict(json.loads(HUB_CONFIG)) == PUBLISHED_CONFIGS["snac_24khz"]


def test_defaults_equal_the_reference() -> None:
    reference = snac.SNAC()
    config = snax.SNACConfig()
    for field in dataclasses.fields(config):
        if hasattr(reference, field.name):
            value = getattr(config, field.name)
            assert getattr(reference, field.name) == (list(value) if isinstance(value, tuple) else value)
    assert config.hop_length == reference.hop_length


@pytest.mark.parametrize(
    ("name", "latent_dim", "hop_length", "pad_multiple", "kbps"),
    [
        ("snac_24khz", 768, 512, 2048, 0.98),
        ("snac_32khz", 1024, 384, 12288, 1.9),
        ("snac_44khz", 1024, 384, 12288, 2.6),
    ],
)
def test_derived_properties(name: str, latent_dim: int, hop_length: int, pad_multiple: int, kbps: float) -> None:
    config = PUBLISHED_CONFIGS[name]
    assert (config.latent_dim, config.hop_length, config.pad_multiple) == (latent_dim, hop_length, pad_multiple)
    assert config.bitrate / 1000 == pytest.approx(kbps, abs=0.05)  # the precision of the model card
    assert snax.SNACConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_rates_of_the_24khz_model() -> None:
    config = PUBLISHED_CONFIGS["snac_24khz"]
    assert config.frame_rate == 46.875
    assert config.code_rates == (11.71875, 23.4375, 46.875)
    assert config.tokens_per_second == 82.03125
    assert config.bitrate == 984.375


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 7, 8])
def test_strided_length(stride: int) -> None:
    for length in range(2 * stride, 6 * stride):
        conv = torch.nn.Conv1d(1, 1, 2 * stride, stride, padding=-(-stride // 2))
        assert strided_length(length, stride) == conv(torch.zeros(1, 1, length)).shape[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_rates": []}, "`encoder_rates`"),
        ({"encoder_rates": 8}, "`encoder_rates`"),
        ({"encoder_rates": [2, 0]}, "`encoder_rates`"),
        ({"vq_strides": [4, 2.5]}, "`vq_strides`"),
        ({"vq_strides": []}, "`vq_strides`"),
        ({"codebook_size": -1}, "`codebook_size`"),
        ({"codebook_dim": "8"}, "`codebook_dim`"),
        ({"encoder_dim": True}, "`encoder_dim`"),
        ({"sampling_rate": 0}, "`sampling_rate`"),
        ({"noise": 1}, "`noise`"),
        ({"depthwise": None}, "`depthwise`"),
        ({"latent_dim": 100}, r"`latent_dim` \(=100\) must be .*768"),
        ({"decoder_rates": [8, 8, 4]}, "`decoder_rates`.*must have the same product as .*512"),
        ({"decoder_rates": [8, 8, 8, 1]}, "`decoder_rates`.*at least 2"),
        ({"decoder_dim": 15}, r"`decoder_dim` \(=15\) must be at least 16"),
        ({"attn_window_size": 0}, "`attn_window_size`"),
        ({"attn_window_size": 32, "decoder_dim": 1000}, r"`decoder_dim` \(=1000\) must be a multiple of 64"),
        ({"attn_window_size": 32, "encoder_dim": 50}, r"`latent_dim` \(=800\) must be a multiple of 64"),
        ({"encoder_rates": [512, 1], "decoder_rates": [512]}, "`encoder_rates`.*rate of 1"),
        ({"encoder_rates": [256, 1, 1, 2], "decoder_rates": [256, 2]}, "`encoder_rates`.*rate of 1"),
        ({"hop_length": 512}, r"unknown fields \['hop_length'\]"),
        # Too large for memory.
        ({"codebook_size": 10**12}, "`codebook_size`.*below 2"),
        ({"codebook_size": 10**8}, "give at least .* parameters. A model must have at most 1000000000"),
        ({"encoder_dim": 2**20}, "give at least .* parameters"),
        ({"decoder_dim": 2**20}, "give at least .* parameters"),
        ({"attn_window_size": 10**6, "decoder_dim": 1024, "encoder_dim": 64}, "a `pad_multiple` of .* at most 1048576"),
        (
            {"encoder_rates": [2, 4, 8, 8] * 4, "decoder_rates": [2, 4, 8, 8] * 4, "decoder_dim": 2**16},
            "`pad_multiple`",
        ),
        ({"encoder_rates": [2] * 10**6}, "must be a list of 1 to 32"),
        ({"vq_strides": [10**6, 1]}, "a `pad_multiple` of"),
        ({"sampling_rate": 10**9}, "at most 768000 Hz"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_rejects_invalid_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        snax.SNACConfig.from_dict(json.loads(HUB_CONFIG) | fields)


@pytest.mark.usefixtures("as_users_see_it")
def test_rejects_configuration_that_is_not_an_object() -> None:
    with pytest.raises(ValueError, match="must be an object"):
        snax.SNACConfig.from_dict(["noise"])


PUBLISHED = [dataclasses.asdict(config) for config in PUBLISHED_CONFIGS.values()]


@pytest.mark.parametrize("changes", [*small.CONFIGS.values(), *PUBLISHED])
def test_parameters_lower_bound(changes: dict[str, Any]) -> None:
    config = snax.SNACConfig(**dataclasses.asdict(small.CONFIG) | {"latent_dim": 0} | changes)
    model = nnx.eval_shape(lambda: snax.SNAC(config, rngs=nnx.Rngs(0)))
    bound, parameters = config._parameters_lower_bound(), sum(leaf.size for leaf in jax.tree.leaves(model))
    assert 0.7 < bound / parameters <= 1
