"""The model under JAX's transformations, its noise, precision and dtypes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import small
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import snax
from snax.codec import compiled
from snax.codec.config import PUBLISHED_CONFIGS
from snax.codec.noise import draw_noise

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def model() -> snax.SNAC:
    return small.model()


def assert_equal(actual: object, expected: object) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_shapes(model: snax.SNAC) -> None:
    audio = small.audio(batch=3, samples=10 * small.PAD - 5)
    codes = model.encode(audio)
    assert [level.shape for level in codes] == [(3, 10), (3, 20), (3, 40)]
    assert model.decode(codes).shape == (3, 1, 10 * small.PAD)
    reconstructed, codes_again = model(audio)
    assert reconstructed.shape == audio.shape
    assert_equal(codes_again, codes)


def test_encode_and_decode_equal_their_parts(model: snax.SNAC) -> None:
    audio = small.audio()
    latents = model.audio_to_latents(audio)
    quantized, codes = model.quantize(latents)
    assert latents.shape == quantized.shape == (1, 40, small.CONFIG.latent_dim)
    assert_equal(codes, model.encode(audio))
    # `quantize` adds and subtracts the projected latents for the gradient, which rounds.
    np.testing.assert_allclose(model.dequantize(codes), quantized, rtol=0, atol=1e-6)
    assert_equal(model.latents_to_audio(model.dequantize(codes)), model.decode(codes))


def test_audio_is_zero_padded(model: snax.SNAC) -> None:
    audio = small.audio(samples=3 * small.PAD + 1)
    padded = np.pad(audio, ((0, 0), (0, 0), (0, small.PAD - 1)))
    assert_equal(model.encode(audio), model.encode(padded))


def test_decoded_length() -> None:
    # With a wrong output padding, a port decodes 120,907 samples.
    rates = {"encoder_rates": (2, 4, 8, 8), "decoder_rates": (8, 8, 4, 2)}
    model = small.model(dataclasses.replace(small.CONFIG, latent_dim=0, **rates))
    codes = [jnp.zeros((1, 236 // stride), jnp.int32) for stride in model.config.vq_strides]
    assert model.decode(codes).shape == (1, 1, 120_832)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_decodes_any_integer_dtype(model: snax.SNAC, dtype: type[np.integer]) -> None:
    codes = model.encode(small.audio())
    assert_equal(model.decode([np.asarray(level).astype(dtype) for level in codes]), model.decode(codes))


def test_jit(model: snax.SNAC) -> None:
    audio = small.audio(samples=5 * small.PAD - 3)

    @jax.jit
    def round_trip(model: snax.SNAC, audio: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        codes = model.encode(audio)
        return model.decode(codes), codes

    decoded, codes = round_trip(model, audio)
    assert_equal(codes, model.encode(audio))
    np.testing.assert_allclose(decoded, model.decode(codes), rtol=0, atol=1e-6)  # fused and rounded differently


def test_vmap(model: snax.SNAC) -> None:
    audio = small.audio(batch=4)
    mapped = jax.vmap(model.encode)(audio[:, None])
    assert_equal([level[:, 0] for level in mapped], list(model.encode(audio)))
    decoded = jax.vmap(model.decode)(mapped)
    np.testing.assert_allclose(decoded[:, 0], model.decode(model.encode(audio)), rtol=0, atol=1e-6)


def test_vmap_over_keys(model: snax.SNAC) -> None:
    codes = model.encode(small.audio())
    keys = jax.random.split(KEY, 3)
    mapped = jax.vmap(lambda key: model.decode(codes, key=key))(keys)
    for key, decoded in zip(keys, mapped, strict=True):
        np.testing.assert_allclose(decoded, model.decode(codes, key=key), rtol=0, atol=1e-6)


def test_straight_through_gradient(model: snax.SNAC) -> None:
    latents = model.audio_to_latents(small.audio())
    weights = jax.random.normal(KEY, latents.shape)
    gradient = jax.grad(lambda latents: (model.quantize(latents)[0] * weights).sum())(latents)
    # Backpropagation through the levels as if each returned its projected input, without the codebook.
    expected = jnp.zeros_like(weights)
    for quantizer in reversed(model.quantizer.quantizers):
        summed = (weights - expected).reshape(1, -1, quantizer.stride, latents.shape[-1]).sum(2)
        projected = summed @ quantizer.out_proj.kernel[0].T @ quantizer.in_proj.kernel[0].T
        expected += jnp.repeat(projected / quantizer.stride, quantizer.stride, axis=1)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)
    audio_gradient = jax.grad(lambda audio: model(audio)[0].sum())(jnp.asarray(small.audio()))
    assert jnp.abs(audio_gradient).max() > 0


@functools.cache
def attention_model() -> snax.SNAC:
    config = dataclasses.replace(small.CONFIG, latent_dim=0, encoder_dim=16, decoder_dim=64, attn_window_size=8)
    return small.model(config)


def compute(model: snax.SNAC, audio: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    codes = model.encode(audio)
    gradient = jax.grad(lambda audio: model(audio, key=KEY)[0].sum())(audio)
    return model.decode(codes, key=KEY), codes, gradient


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batch_inside_jit(axis_type: AxisType) -> None:
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    model, audio = attention_model(), small.audio(batch=8, samples=5 * small.PAD - 3)
    expected = jax.jit(compute)(model, audio)
    with jax.set_mesh(mesh):
        arguments = jax.device_put(model, NamedSharding(mesh, PartitionSpec())), jax.device_put(audio, rows)
        compiled = jax.jit(compute).lower(*arguments).compile()
        decoded, codes, gradient = compiled(*arguments)
        for array in (decoded, gradient, *codes):
            assert array.sharding.is_equivalent_to(rows, array.ndim), "the batch is not sharded"
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in compiled.as_text()
    assert_equal(codes, expected[1])
    np.testing.assert_allclose(decoded, expected[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(gradient, expected[2], rtol=1e-4, atol=1e-5)


def test_sharded_batch_outside_jit() -> None:
    mesh = jax.make_mesh((4,), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    audio = small.audio(batch=4, samples=5 * small.PAD - 3)
    replicated = jax.device_put(attention_model(), NamedSharding(mesh, PartitionSpec()))
    codes = replicated.encode(jax.device_put(audio, rows))
    assert_equal(codes, attention_model().encode(audio))
    for array in (*codes, replicated.decode(codes, key=KEY)):
        assert array.sharding.is_equivalent_to(rows, array.ndim)


def test_shard_map() -> None:
    mesh = jax.make_mesh((4,), ("data",))
    audio = small.audio(batch=8)
    encode = jax.shard_map(
        lambda model, audio: model.encode(audio),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    rows = jax.device_put(audio, NamedSharding(mesh, PartitionSpec("data")))
    assert_equal(jax.jit(encode)(attention_model(), rows), attention_model().encode(audio))


def test_decoding_without_key_is_deterministic(model: snax.SNAC) -> None:
    codes = model.encode(small.audio())
    assert_equal(model.decode(codes), model.decode(codes))


def test_noise_depends_on_the_key(model: snax.SNAC) -> None:
    codes = model.encode(np.repeat(small.audio(), 2, axis=0))
    silent, first, second = (
        model.decode(codes),
        model.decode(codes, key=KEY),
        model.decode(codes, key=jax.random.key(1)),
    )
    assert_equal(first, model.decode(codes, key=KEY))
    assert not np.allclose(first, silent, atol=1e-4)
    assert not np.allclose(first, second, atol=1e-4)
    jitted = jax.jit(lambda codes, key: model.decode(codes, key=key))
    assert not np.allclose(jitted(codes, KEY), jitted(codes, jax.random.key(1)), atol=1e-4), "jit ignores the key"


def test_one_key_or_one_per_row(model: snax.SNAC) -> None:
    codes = model.encode(np.repeat(small.audio(), 2, axis=0))
    shared = model.decode(codes, key=KEY)
    np.testing.assert_allclose(shared[0], shared[1], rtol=0, atol=1e-6)
    keys = jax.random.split(KEY, 2)
    for own in (model.decode(codes, key=keys), model(model.decode(codes), key=keys)[0]):
        assert not np.allclose(own[0], own[1], atol=1e-4)
    for row, key in enumerate(keys):
        alone = model.decode([level[row : row + 1] for level in codes], key=key)
        np.testing.assert_allclose(model.decode(codes, key=keys)[row], alone[0], rtol=0, atol=1e-6)


@pytest.mark.usefixtures("as_users_see_it")
def test_rejects_wrong_number_of_keys(model: snax.SNAC) -> None:
    with pytest.raises(ValueError, match="`key` must be one key, or one for each of the 1 rows, got 3"):
        model.decode(model.encode(small.audio()), key=jax.random.split(KEY, 3))


def frames(first: int, count: int) -> jax.Array:
    return first + jnp.arange(count)[None]


def test_noise_is_standard_normal() -> None:
    config = PUBLISHED_CONFIGS["snac_24khz"]
    noise = draw_noise(config, jax.random.split(KEY, 4), frames(0, 100))
    assert [block.shape for block in noise] == [(4, 100 * samples) for samples in (8, 64, 256, 512)]
    flat = np.concatenate([np.ravel(block) for block in noise])
    # Five standard errors of 336,000 standard normal draws.
    assert abs(flat.mean()) < 5 / flat.size**0.5
    assert abs(flat.var() - 1) < 5 * (2 / flat.size) ** 0.5
    assert len(np.unique(flat)) > 0.95 * flat.size, "noise repeats"  # float32 has about 2**23 different values


def test_noise_depends_only_on_frame_position() -> None:
    all_noise, part_noise = draw_noise(small.CONFIG, KEY, frames(0, 9)), draw_noise(small.CONFIG, KEY, frames(5, 3))
    for whole, part in zip(all_noise, part_noise, strict=True):
        samples = whole.shape[1] // 9
        np.testing.assert_array_equal(part, whole[:, 5 * samples : 8 * samples])


def test_old_style_keys(model: snax.SNAC) -> None:
    codes = model.encode(small.audio())
    assert_equal(model.decode(codes, key=jax.random.PRNGKey(0)), model.decode(codes, key=KEY))


def test_model_without_noise_ignores_the_key() -> None:
    model = small.model(dataclasses.replace(small.CONFIG, noise=False))
    codes = model.encode(small.audio())
    assert_equal(model.decode(codes, key=KEY), model.decode(codes))


@pytest.mark.parametrize("default", [None, "bfloat16", "tensorfloat32"])
@pytest.mark.parametrize("precision", ["highest", "default"])
def test_model_sets_matmul_precision(default: str | None, precision: str) -> None:
    model = snax.SNAC(attention_model().config, precision=precision, rngs=small.rngs())

    def gradient(model: snax.SNAC, audio: jax.Array) -> snax.SNAC:
        return jax.grad(lambda model: model(audio, key=KEY)[0].sum())(model)

    with jax.default_matmul_precision(default):
        lowered = jax.jit(gradient).lower(model, small.audio()).as_text()
    products = [line for line in lowered.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 50
    expected = "precision = [HIGHEST, HIGHEST]" if precision == "highest" else "precision = [DEFAULT, DEFAULT]"
    others = [product for product in products if expected not in product]
    distances = f"x{model.config.codebook_size}xf32>"
    # The codebook lookup is always in float32.
    lookups = [product for product in others if "precision = [HIGHEST, HIGHEST]" in product and distances in product]
    assert others == lookups
    assert len(lookups) == (len(model.config.vq_strides) if precision == "default" else 0)


def test_bfloat16() -> None:
    exact = attention_model()
    rounded = jax.tree.map(lambda parameter: parameter.astype(jnp.bfloat16), exact)
    assert rounded.dtype == jnp.bfloat16
    audio = small.audio(samples=small.CONFIG.pad_multiple * 24)
    reconstructed, codes = rounded(audio, key=KEY)
    assert reconstructed.dtype == jnp.bfloat16
    assert rounded.audio_to_latents(audio).dtype == jnp.bfloat16
    assert {level.dtype for level in codes} == {jnp.dtype("int32")}
    # Decoding of the same codes may differ by a few bfloat16 roundings (0.4 %).
    codes = exact.encode(audio)
    expected = exact.decode(codes)
    error = jnp.abs(rounded.decode(codes).astype(jnp.float32) - expected).max() / jnp.abs(expected).max()
    assert error < 0.05


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_compiler_options(model: snax.SNAC, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the outermost compilation has compiler options, because JAX rejects them inside a transformation."""
    audio = small.audio()
    expected = model.encode(audio)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jax.clear_caches()
    assert_equal(model.encode(audio), expected)
    assert_equal(jax.jit(lambda audio: model.encode(audio))(audio), expected)
    assert_equal(jax.jit(lambda: model.encode(audio))(), expected)
    assert_equal(jax.vmap(model.encode)(audio[None]), tuple(level[None] for level in expected))
    assert jnp.abs(jax.grad(lambda audio: model(audio)[0].sum())(jnp.asarray(audio))).max() > 0
    jax.clear_caches()


def test_compiler_options_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that XLA rejects fails outside of transformations, and is absent inside the user's own `jit`."""
    monkeypatch.setattr(compiled, "compiler_options", lambda backend: {"xla_no_such_option": 1})

    class Doubling(nnx.Module):
        precision = "highest"

        @compiled.compiled
        def __call__(self, x: jax.Array) -> jax.Array:
            return 2 * x

    double = Doubling()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        double(jnp.ones(3))
    np.testing.assert_array_equal(jax.jit(double)(jnp.ones(3)), 2)


def test_unknown_compiler_options_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other versions of XLA know other options. The known ones are still applied."""
    options = {"xla_no_such_option": 1, "xla_cpu_prefer_vector_width": 512}
    monkeypatch.setitem(compiled.COMPILER_OPTIONS, "cpu", options)
    assert compiled.compiler_options("cpu") == {"xla_cpu_prefer_vector_width": 512}
    assert compiled.compiler_options("tpu") == {}


def test_changes_after_a_call() -> None:
    """A model keeps its flattened form between calls, but sees new values, new variables and new modules."""
    model, other = (snax.SNAC(small.CONFIG, rngs=nnx.Rngs(seed)) for seed in range(2))
    codes = other.encode(small.audio())
    before = model.decode(codes)
    bias = model.decoder.conv_out.bias
    bias[...] = bias[...] + 0.5
    changed_value = model.decode(codes)
    assert jnp.abs(changed_value - before).max() > 0.01
    model.decoder.conv_out.bias = nnx.Param(bias[...] - 0.5)
    np.testing.assert_allclose(model.decode(codes), before, atol=1e-6)  # the bias is rounded twice
    model.decoder, model.quantizer = other.decoder, other.quantizer
    np.testing.assert_array_equal(model.decode(codes), other.decode(codes))
