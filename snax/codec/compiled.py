"""`jax.jit` for the methods of the codec, with matmul precision, shardings and compiler options."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state
from jax.sharding import PartitionSpec

# benchmarks/README.md has the gain of each option, under "Compiler options".
COMPILER_OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "cpu": {
        # XLA uses vectors of 256 bits by default, even if the processor has 512.
        "xla_cpu_prefer_vector_width": 512,
        # Eigen instead of YNNPACK for matrix products.
        "xla_cpu_experimental_ynn_fusion_type": "",
    },
    # Without this option XLA autotunes dozens of Triton kernels for each float32 matmul: half a minute for a codec.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}

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

    return outermost_jit(traced)


def outermost_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` with the compiler options of the backend, unless another transformation traces the function.

    JAX rejects compiler options inside a transformation. The options of a user's own `jit` are the user's.
    """

    @functools.cache
    def jitted(backend: str | None) -> Any:
        return jax.jit(function, compiler_options=None if backend is None else _known_options(backend))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        outermost = get_opaque_trace_state(convention="nnx") == _NOT_TRACING
        return jitted(jax.default_backend() if outermost else None)(*args)

    return call


@functools.cache
def _known_options(backend: str) -> dict[str, bool | int | str]:
    """The compiler options that this version of XLA knows. It rejects others when it compiles."""
    known = {}
    for name, value in COMPILER_OPTIONS.get(backend, {}).items():
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except jax.errors.JaxRuntimeError:
            continue
        known[name] = value
    return known
