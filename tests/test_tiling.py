"""Tiled layers equal the same layers without tiles."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from jax.sharding import NamedSharding, PartitionSpec

import snax
from snax.codec import tiling
from snax.codec.layers import receptive_field

KEY = jax.random.key(1)
FRAMES = 120  # 4 to 22 of the tiles below. The last tile is not always full.


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiling, "TILE_SAMPLES", 130)
    jax.clear_caches()  # compiled for another tile size
    yield
    jax.clear_caches()


def untiled(f: Callable[..., Any], *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "TILE_SAMPLES", 10**9)
        jax.clear_caches()
        result = jax.jit(f)(*args)
    jax.clear_caches()
    return result


def assert_close(actual: jax.Array, expected: jax.Array) -> None:
    # For float32 rounding: with another number of frames, XLA sums in a different order.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * float(jnp.sqrt(jnp.mean(expected**2))))


@pytest.mark.parametrize(
    "name",
    [
        "depthwise",
        "attention",
        pytest.param("plain convolutions, odd rates", marks=pytest.mark.slow),
        pytest.param("decoder with other rates", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_tiled_equals_untiled(name: str) -> None:
    model = small.variant(name)
    audio = jnp.asarray(small.audio(batch=2, samples=FRAMES * model.config.hop_length))
    latents = untiled(type(model).audio_to_latents, model, audio)
    assert_close(jax.jit(type(model).audio_to_latents)(model, audio), latents)
    decode = type(model).latents_to_audio
    assert_close(jax.jit(decode)(model, latents, key=KEY), untiled(lambda *a: decode(*a, key=KEY), model, latents))


@pytest.mark.usefixtures("small_tiles")
def test_half_the_context_changes_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.variant("depthwise")
    audio = jnp.asarray(small.audio(samples=FRAMES * small.HOP))
    latents = untiled(type(model).audio_to_latents, model, audio)
    monkeypatch.setattr(tiling, "receptive_field", lambda layers: receptive_field(layers) // 2)
    with pytest.raises(AssertionError, match="Not equal"):
        assert_close(jax.jit(type(model).audio_to_latents)(model, audio), latents)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_gradients() -> None:
    model = small.variant("depthwise")
    audio = jnp.asarray(small.audio(samples=FRAMES * small.HOP))

    def loss(model: snax.SNAC, audio: jax.Array) -> jax.Array:
        return jnp.square(model(audio)[0] - audio).mean()

    actual, expected = jax.jit(jax.grad(loss))(model, audio), untiled(jax.grad(loss), model, audio)
    for tiled_leaf, leaf in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # For float32 sums over time.
        assert float(jnp.linalg.norm(tiled_leaf - leaf)) <= 1e-4 * float(jnp.linalg.norm(leaf))


@pytest.mark.usefixtures("small_tiles")
def test_sharded_batch_needs_no_communication() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = small.variant("depthwise")
    audio = small.audio(batch=4, samples=FRAMES * small.HOP)
    rows = jax.device_put(audio, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(lambda model, audio: model(audio, key=KEY)).lower(replicated, rows).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in compiled.as_text()
    decoded, codes = compiled(replicated, rows)
    expected, expected_codes = model(audio, key=KEY)
    assert_close(decoded, expected)
    for level, expected_level in zip(codes, expected_codes, strict=True):
        np.testing.assert_array_equal(level, expected_level)
