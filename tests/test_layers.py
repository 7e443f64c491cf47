"""The time geometry of the layers, and its use by packing, tiling and streaming."""

import dataclasses
import functools
from fractions import Fraction
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import small

import snax
from snax.codec import layers, tiling
from snax.codec import model as model_module
from snax.codec.attention import LocalMHA
from snax.codec.layers import Context, Layer
from snax.inference import steps

CHANNELS = 64  # the size of an attention head
LAYERS = {
    "conv": lambda rngs: layers.Conv(CHANNELS, 3, 7, rngs=rngs),
    "dilated depthwise conv": lambda rngs: layers.Conv(CHANNELS, CHANNELS, 5, dilation=3, groups=CHANNELS, rngs=rngs),
    "pointwise conv": lambda rngs: layers.Conv(CHANNELS, 3, 1, rngs=rngs),
    "even stride": lambda rngs: layers.StridedConv(CHANNELS, 5, 4, rngs=rngs),
    "odd stride": lambda rngs: layers.StridedConv(CHANNELS, 5, 3, rngs=rngs),
    "even transposed": lambda rngs: layers.TransposedConv(CHANNELS, 5, 4, rngs=rngs),
    "odd transposed": lambda rngs: layers.TransposedConv(CHANNELS, 5, 3, rngs=rngs),
    "transposed, stride of one": lambda rngs: layers.TransposedConv(CHANNELS, 5, 1, rngs=rngs),
    "snake": lambda rngs: layers.Snake(CHANNELS, rngs=rngs),
    "residual unit": lambda rngs: layers.ResidualUnit(CHANNELS, dilation=2, groups=1, rngs=rngs),
    "encoder block": lambda rngs: layers.EncoderBlock(CHANNELS, 8, 3, depthwise=True, rngs=rngs),
    "decoder block": lambda rngs: layers.DecoderBlock(CHANNELS, 4, 3, index=0, noise=False, depthwise=False, rngs=rngs),
    "attention": lambda rngs: LocalMHA(CHANNELS, 8, rngs=rngs),
}
STEPS = 240  # a multiple of all strides and windows


@functools.cache
def layer_and_input(name: str) -> tuple[Layer, jax.Array]:
    audio = np.random.default_rng(0).standard_normal((1, STEPS, CHANNELS), np.float32)
    return LAYERS[name](nnx.Rngs(0)), jnp.asarray(audio)


@pytest.mark.parametrize("name", LAYERS)
def test_output_ratio(name: str) -> None:
    layer, x = layer_and_input(name)
    assert layer(x).shape[1] == STEPS * layers.output_ratio([layer])


@pytest.mark.parametrize("name", LAYERS)
def test_receptive_field(name: str) -> None:
    """A changed input changes the outputs within the receptive field, and no others."""
    layer, x = layer_and_input(name)
    ratio, receptive_field = layers.output_ratio([layer]), layers.receptive_field([layer])
    block = max(part.block_size for part in layers.flatten([layer]))
    farthest = 0
    for changed in range(STEPS // 2, STEPS // 2 + 8):
        difference = np.abs(np.asarray(layer(x.at[0, changed].add(1.0)) - layer(x))).max(axis=(0, 2))
        for output in np.flatnonzero(difference > 1e-7):
            block_start = int(Fraction(int(output)) / ratio) // block * block
            distance = max(block_start - changed, changed - (block_start + block - 1), 0)
            assert distance <= receptive_field
            farthest = max(farthest, distance)
    # Rounding up to whole blocks may add up to two blocks.
    assert receptive_field - farthest < 2 * block + 1


@pytest.mark.parametrize("chunk_steps", [24, 48, 120])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_step(name: str, chunk_steps: int) -> None:
    layer, x = layer_and_input(name)
    whole, caches, outputs, rate = layer(x), None, [], 24
    for start in range(0, STEPS, chunk_steps):
        chunk = x[:, start : start + chunk_steps]
        output, caches, delay = steps.step_layers([layer], chunk, rate, caches, start // rate, steps.FAR)
        outputs.append(output)
    frames = -(-delay // int(rate * layers.output_ratio([layer])))
    padding = jnp.zeros((1, frames * rate, CHANNELS))
    if frames:
        outputs.append(steps.step_layers([layer], padding, rate, caches, STEPS // rate, 0)[0])
    streamed = jnp.concatenate(outputs, axis=1)[:, delay : delay + whole.shape[1]]
    np.testing.assert_allclose(streamed, whole, rtol=0, atol=2e-5)  # float32 sums in a different order


@pytest.mark.parametrize(
    ("name", "kernel_size", "dilations"),
    [
        ("depthwise", 5, (1, 3, 9)),
        pytest.param("plain convolutions, odd rates", 7, (2, 5), marks=pytest.mark.slow),
        pytest.param("attention", 3, (1, 2, 4, 8), marks=pytest.mark.slow),
    ],
)
def test_all_runners_follow_the_geometry(name: str, kernel_size: int, dilations: tuple[int, ...]) -> None:
    """Kernel size, dilations and the number of residual units are defined once, in `layers`."""
    config = dataclasses.replace(small.CONFIG, latent_dim=0, **small.CONFIGS[name])
    with (
        mock.patch.object(layers, "KERNEL_SIZE", kernel_size),
        mock.patch.object(model_module, "KERNEL_SIZE", kernel_size),
        mock.patch.object(layers, "DILATIONS", dilations),
    ):
        model = snax.SNAC(config, rngs=small.rngs())
    assert model.encoder.conv_in.kernel.shape[0] == kernel_size
    assert len(model.decoder.blocks[0].residual_units) == len(dilations)
    lengths = [40 * config.pad_multiple, 23 * config.pad_multiple]
    clips = [small.audio(samples=length, seed=i)[0, 0] for i, length in enumerate(lengths)]
    expected_codes = [model.encode(clip[None, None]) for clip in clips]
    expected_audio = [model.decode(codes)[0, 0] for codes in expected_codes]

    def assert_same(codes: list[tuple[np.ndarray, ...]], audio: list[np.ndarray]) -> None:
        expected = [tuple(level[0] for level in levels) for levels in expected_codes]
        jax.tree.map(np.testing.assert_array_equal, codes, expected)
        for samples, expected_samples in zip(audio, expected_audio, strict=True):
            np.testing.assert_allclose(samples, expected_samples, rtol=0, atol=1e-5)

    # A batch with a padding mask.
    batch = np.stack([clips[0], np.pad(clips[1], (0, lengths[0] - lengths[1]), constant_values=0.5)])[:, None]
    frames = [length // config.hop_length for length in lengths]
    padding_mask = np.arange(frames[0])[None] < np.array(frames)[:, None]
    codes = model.encode(batch, padding_mask=padding_mask)
    counts = [[level.shape[1] for level in levels] for levels in expected_codes]
    masked = [tuple(level[i, :n] for level, n in zip(codes, counts[i], strict=True)) for i in range(2)]
    decoded = model.decode(codes, padding_mask=padding_mask)
    assert_same(masked, [decoded[i, 0, :length] for i, length in enumerate(lengths)])

    # Packed rows.
    row_seconds = 31 * config.pad_multiple / config.sampling_rate
    encoded = list(snax.encode_many(model, clips, row_seconds=row_seconds))
    assert_same([clip.codes for clip in encoded], list(snax.decode_many(model, encoded, row_seconds=row_seconds)))

    # Tiles.
    with mock.patch.object(tiling, "TILE_SAMPLES", 170):
        jax.clear_caches()
        tiled = [model.encode(clip[None, None]) for clip in clips]
        audio = [model.decode(codes)[0, 0] for codes in tiled]
    jax.clear_caches()
    assert_same([tuple(level[0] for level in codes) for codes in tiled], audio)

    # Streams.
    streamed, audio = [], []
    encoder, decoder = snax.StreamEncoder(model), snax.StreamDecoder(model)
    for clip, codes in zip(clips, expected_codes, strict=True):
        state, head = encoder.step(encoder.init_state(), clip[None, None])
        streamed.append(jax.tree.map(lambda *x: np.concatenate(x, axis=1)[0], head, encoder.flush(state)))
        state, samples = decoder.step(decoder.init_state(), codes)
        audio.append(np.concatenate([samples, decoder.flush(state)], axis=2)[0, 0])
    assert_same(streamed, audio)


def test_decoder_block_adds_noise_from_context() -> None:
    block = layers.DecoderBlock(8, 4, 2, index=0, noise=True, depthwise=True, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 6, 8))
    silent, noisy = block(x), block(x, Context(noise=[jnp.ones((1, 12))]))
    assert (silent != noisy).any()
