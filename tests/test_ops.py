"""Activations against float64, and convolutions against torch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from snax.codec import ops


def test_sin_squared() -> None:
    t = np.concatenate([np.linspace(-1000, 1000, 1_000_001), np.linspace(-4, 4, 100_001)]).astype(np.float32)
    exact = t.astype(np.float64)
    # Bounds: a few float32 roundings (6e-8) of values up to 1. The derivative doubles them.
    np.testing.assert_allclose(ops.sin_squared(jnp.asarray(t)), np.sin(exact) ** 2, rtol=0, atol=3e-7)
    np.testing.assert_allclose(ops.sin_twice(jnp.asarray(t)), np.sin(2 * exact), rtol=0, atol=1e-6)


def test_snake() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 500, 8)).astype(np.float32)
    alpha = np.array([1e-3, -0.5, 0.1, 1, 3, 30, 300, 0], np.float32)[None, None]
    exact = x.astype(np.float64) + np.sin(alpha.astype(np.float64) * x) ** 2 / (alpha.astype(np.float64) + 1e-9)
    exact[..., -1] = x[..., -1]  # with alpha 0 the sine is 0, too
    # Rounding alpha * x moves the phase by up to |alpha * x| * 6e-8. The division by alpha cancels this growth.
    np.testing.assert_allclose(ops.snake(jnp.asarray(x), jnp.asarray(alpha)), exact, rtol=1e-6, atol=1e-6)


def test_snake_gradient() -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 2, 500, 7)).astype(np.float32)
    alpha = np.array([1e-2, -0.5, 0.1, 1, 3, 30, 300], np.float32)[None, None]
    dx, dalpha = jax.vjp(ops.snake, jnp.asarray(x), jnp.asarray(alpha))[1](jnp.asarray(dy))
    x, alpha, dy = (array.astype(np.float64) for array in (x, alpha, dy))
    slope = np.sin(2 * alpha * x)
    expected_dx = dy * (1 + slope)
    terms = dy * (x * slope / alpha - np.sin(alpha * x) ** 2 / alpha**2)
    # The phase is off by up to |alpha * x| * 6e-8, and sums by a few roundings of their terms.
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-6, atol=1e-6 * np.abs(alpha * x).max())
    np.testing.assert_array_less(np.abs(dalpha[0, 0] - terms.sum((0, 1))), 1e-5 * np.abs(dy * x / alpha).sum((0, 1)))


def test_snake_computes_bfloat16_in_float32() -> None:
    x = jnp.linspace(-50, 50, 1000).reshape(1, -1, 1).astype(jnp.bfloat16)
    alpha = jnp.full((1, 1, 1), 3, jnp.bfloat16)
    exact = ops.snake(x.astype(jnp.float32), alpha.astype(jnp.float32))
    np.testing.assert_array_equal(ops.snake(x, alpha), exact.astype(jnp.bfloat16))


# Relative to the largest value. For float32 sums of up to 7 * 24 products of normal values.
TOLERANCE = 3e-6


@pytest.mark.parametrize("dilation", [1, 3, 9])
@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 24), (24, 1), (8, 24), (24, 8), (16, 16)])
@pytest.mark.parametrize("time", [1, 5, 60])
def test_conv(in_channels: int, out_channels: int, dilation: int, time: int) -> None:
    layer = torch.nn.Conv1d(in_channels, out_channels, 7, dilation=dilation, padding=3 * dilation, bias=False)
    assert_same(layer, lambda x, w: ops.conv(x, w.transpose(2, 1, 0), dilation), in_channels, time)


def test_conv_of_one_tap() -> None:
    layer = torch.nn.Conv1d(24, 8, 1, bias=False)
    assert_same(layer, lambda x, w: ops.conv(x, w.transpose(2, 1, 0)), 24, 10)


@pytest.mark.parametrize("dilation", [1, 3, 9])
@pytest.mark.parametrize("time", [1, 5, 60])
def test_depthwise_conv(dilation: int, time: int) -> None:
    layer = torch.nn.Conv1d(24, 24, 7, dilation=dilation, padding=3 * dilation, groups=24, bias=False)
    assert_same(layer, lambda x, w: ops.depthwise_conv(x, w.transpose(2, 1, 0), dilation), 24, time)


@pytest.fixture(params=[ops.WINOGRAD_MIN_FRAMES, 1], ids=["one product", "winograd"])
def winograd_min_frames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "WINOGRAD_MIN_FRAMES", request.param)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.usefixtures("winograd_min_frames")
def test_strided_conv(stride: int, extra: int) -> None:
    layer = torch.nn.Conv1d(8, 16, 2 * stride, stride, padding=-(-stride // 2), bias=False)
    assert_same(layer, lambda x, w: ops.strided_conv(x, w.transpose(2, 1, 0)), 8, 12 * stride + extra)


@pytest.mark.parametrize("stride", [2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("frames", [1, 12, 13])
@pytest.mark.usefixtures("winograd_min_frames")
def test_transposed_conv(stride: int, frames: int) -> None:
    layer = torch.nn.ConvTranspose1d(
        16, 8, 2 * stride, stride, padding=-(-stride // 2), output_padding=stride % 2, bias=False
    )

    def transposed_conv(x: jax.Array, weight: jax.Array) -> jax.Array:
        return ops.transposed_conv(x, weight.reshape(16, 8, 2, stride).transpose(2, 0, 3, 1))

    assert_same(layer, transposed_conv, 16, frames)


def assert_same(layer: torch.nn.Module, op: Callable[..., jax.Array], channels: int, time: int) -> None:
    """Compare outputs and gradients."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2, channels, time), np.float32)).requires_grad_()
    y = layer(x)
    dy = torch.from_numpy(rng.standard_normal(y.shape, np.float32))
    y.backward(dy)
    transposed, weight = jnp.asarray(x.detach().numpy().swapaxes(1, 2)), jnp.asarray(layer.weight.detach().numpy())
    actual, vjp = jax.vjp(op, transposed, weight)
    dx, dweight = vjp(jnp.asarray(dy.numpy().swapaxes(1, 2)))
    assert x.grad is not None
    assert layer.weight.grad is not None
    for array, tensor in ((actual, y.mT), (dx, x.grad.mT), (dweight, layer.weight.grad)):
        assert array.shape == tensor.shape
        expected = tensor.detach().numpy()
        np.testing.assert_allclose(array, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
