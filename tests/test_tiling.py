"""Layers in tiles of time against the same layers in one piece."""

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
FRAMES = 120  # 4 to 22 of the tiles below, the last of them not always whole


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tiling, "TILE_SAMPLES", 130)
    jax.clear_caches()  # what was compiled for tiles of another size
    yield
    jax.clear_caches()


def in_one_piece(f: Callable[..., Any], *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "TILE_SAMPLES", 10**9)
        jax.clear_caches()
        result = jax.jit(f)(*args)
    jax.clear_caches()
    return result


def assert_close(found: jax.Array, expected: jax.Array) -> None:
    # float32's rounding: products over another number of frames are summed in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.sqrt(jnp.mean(expected**2))))


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
def test_tiles_change_nothing(name: str) -> None:
    model = small.drawn(name)
    audio = jnp.asarray(small.audio(batch=2, samples=FRAMES * model.config.hop_length))
    latents = in_one_piece(type(model).audio_to_latents, model, audio)
    assert_close(jax.jit(type(model).audio_to_latents)(model, audio), latents)
    decode = type(model).latents_to_audio
    assert_close(jax.jit(decode)(model, latents, key=KEY), in_one_piece(lambda *a: decode(*a, key=KEY), model, latents))


@pytest.mark.usefixtures("small_tiles")
def test_tiles_with_half_the_context_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small.drawn("depthwise")
    audio = jnp.asarray(small.audio(samples=FRAMES * small.HOP))
    latents = in_one_piece(type(model).audio_to_latents, model, audio)
    monkeypatch.setattr(tiling, "receptive_field", lambda layers: receptive_field(layers) // 2)
    with pytest.raises(AssertionError, match="Not equal"):
        assert_close(jax.jit(type(model).audio_to_latents)(model, audio), latents)


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
def test_gradients() -> None:
    model = small.drawn("depthwise")
    audio = jnp.asarray(small.audio(samples=FRAMES * small.HOP))

    def loss(model: snax.SNAC, audio: jax.Array) -> jax.Array:
        return jnp.square(model(audio)[0] - audio).mean()

    found, expected = jax.jit(jax.grad(loss))(model, audio), in_one_piece(jax.grad(loss), model, audio)
    for ours, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert float(jnp.linalg.norm(ours - whole)) <= 1e-4 * float(jnp.linalg.norm(whole)), "of float32 sums over time"


@pytest.mark.usefixtures("small_tiles")
def test_sharded_batch_stays_where_it_is() -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = small.drawn("depthwise")
    audio = small.audio(batch=4, samples=FRAMES * small.HOP)
    rows = jax.device_put(audio, NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(lambda model, audio: model(audio, key=KEY)).lower(replicated, rows).compile()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in compiled.as_text()
    decoded, codes = compiled(replicated, rows)
    expected, expected_codes = model(audio, key=KEY)
    assert_close(decoded, expected)
    for ours, alone in zip(codes, expected_codes, strict=True):
        np.testing.assert_array_equal(ours, alone)
