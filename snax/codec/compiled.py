"""`jax.jit` for the methods of the codec, with matmul precision, shardings and compiler options."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state
from jax.sharding import PartitionSpec

# Without this option XLA autotunes dozens of Triton kernels for each float32 matmul: half a minute for a codec.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}

# The trace state outside of all transformations (`jit`, `vmap`, `grad`, ...).
_NOT_TRACING = get_opaque_trace_state(convention="nnx")


def compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a method of a model, or a function whose first argument is a model.

    Matrix products use `model.precision`. On a mesh with explicit axes (the default of `jax.make_mesh`), results are
    sharded over the batch like the first input.
    """

    @functools.wraps(method)
    def traced(self: Any, batched: Any, *args: Any) -> Any:
        sharding = jax.typeof(jax.tree.leaves(batched)[0]).sharding
        run = method
        if sharding.mesh.explicit_axes:
            run = jax.sharding.auto_axes(method, out_sharding=sharding.update(spec=PartitionSpec(sharding.spec[0])))
        with jax.default_matmul_precision(self.precision):
            return run(self, batched, *args)

    plain, on_gpu = jax.jit(traced), jax.jit(traced, compiler_options=GPU_OPTIONS)

    @functools.wraps(method)
    def call(self: Any, batched: Any, *args: Any) -> Any:
        # JAX rejects compiler options inside a transformation.
        outermost = get_opaque_trace_state(convention="nnx") == _NOT_TRACING
        jitted = on_gpu if outermost and jax.default_backend() == "gpu" else plain
        return jitted(self, batched, *args)

    return call
