"""`jax.jit` for the codec's methods: precision, shardings and compiler options."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state
from jax.sharding import PartitionSpec

# For each float32 product XLA would compile dozens of Triton kernels to choose from, half a minute for a codec.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# The trace state outside of `jit`, `vmap`, `grad` and other transformations.
_NOT_TRACING = get_opaque_trace_state(convention="nnx")


def compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a method of a model, or a function of one, with its products at the model's `precision`.

    On a mesh with explicit axes (what `jax.make_mesh` makes) results are sharded over the batch as the argument is.
    """

    @functools.wraps(method)
    def traced(self: Any, batched: Any, *args: Any) -> Any:
        sharding = jax.typeof(jax.tree.leaves(batched)[0]).sharding
        in_mesh = method
        if sharding.mesh.explicit_axes:
            in_mesh = jax.sharding.auto_axes(method, out_sharding=sharding.update(spec=PartitionSpec(sharding.spec[0])))
        with jax.default_matmul_precision(self.precision):
            return in_mesh(self, batched, *args)

    plain, on_gpu = jax.jit(traced), jax.jit(traced, compiler_options=GPU_OPTIONS)

    @functools.wraps(method)
    def call(self: Any, batched: Any, *args: Any) -> Any:
        # JAX rejects compiler options inside another transformation.
        outermost = get_opaque_trace_state(convention="nnx") == _NOT_TRACING
        run = on_gpu if outermost and jax.default_backend() == "gpu" else plain
        return run(self, batched, *args)

    return call
