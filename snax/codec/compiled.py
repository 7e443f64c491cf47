"""`jax.jit` for the methods of the codec, with matmul precision, shardings and compiler options."""

import functools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.extend.core import get_opaque_trace_state
from jax.sharding import PartitionSpec

# benchmarks/README.md has the gain of each option, under "Compiler options".
COMPILER_OPTIONS: dict[str, dict[str, bool | int | str]] = {
    "cpu": {
        # XLA uses vectors of 256 bits by default, even if the processor has 512.
        "xla_cpu_prefer_vector_width": 512,
    },
    # Without this option XLA autotunes dozens of Triton kernels for each float32 matmul: half a minute for a codec.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}

# The trace state outside of all transformations (`jit`, `vmap`, `grad`, ...).
_NOT_TRACING = get_opaque_trace_state(convention="nnx")


def compiled(method: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()) -> Callable[..., Any]:
    """`jax.jit` for a method of a model, or a function whose first argument is a model.

    Matrix products use `model.precision`. On a mesh with explicit axes (the default of `jax.make_mesh`), results are
    sharded over the batch like the first input. The compiler options of the backend are set, unless another
    transformation traces the method: JAX rejects them there, and the options of a user's own `jit` are the user's.

    Args:
        method: the method. Its second argument has the batch as its first axis.
        donate_argnums: as in `jax.jit`, counted with the model as argument 0.
    """

    @functools.cache
    def jitted(structure: jax.tree_util.PyTreeDef, backend: str | None) -> Any:
        @functools.wraps(method)
        def run(variables: list[Any], batched: Any, *args: Any) -> Any:
            model = jax.tree.unflatten(structure, variables)
            sharding = jax.typeof(jax.tree.leaves(batched)[0]).sharding
            sharded = method
            if sharding.mesh.explicit_axes:
                spec = PartitionSpec(sharding.spec[0])
                sharded = jax.sharding.auto_axes(method, out_sharding=sharding.update(spec=spec))
            with jax.default_matmul_precision(model.precision):
                return sharded(model, batched, *args)

        options = None if backend is None else compiler_options(backend)
        return jax.jit(run, donate_argnums=donate_argnums, compiler_options=options)

    @functools.wraps(method)
    def call(model: nnx.Module, *args: Any) -> Any:
        if get_opaque_trace_state(convention="nnx") != _NOT_TRACING:
            variables, structure = _flatten(model)
            return jitted(structure, None)(variables, *args)
        if model not in _FLATTENED or _FLATTENED[model].attributes_changed():
            _FLATTENED[model] = _Flattened(model)
        flattened = _FLATTENED[model]
        return jitted(flattened.structure, jax.default_backend())(flattened.variables, *args)

    return call


class _Flattened:
    """The variables of a model and the structure around them.

    `jax.tree.flatten` takes 0.5 ms for the 183 modules of a codec, which is as long as a GPU takes for a second of
    audio. To see whether the modules are still the same takes 0.02 ms.
    """

    def __init__(self, model: nnx.Module):
        self.variables, self.structure = _flatten(model)
        self._modules = [vars(node) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Pytree)]
        self._attributes = self._current_attributes()

    def attributes_changed(self) -> bool:
        current = self._current_attributes()
        return len(current) != len(self._attributes) or not all(map(operator.is_, current, self._attributes))

    def _current_attributes(self) -> list[Any]:
        return [attribute for attributes in self._modules for attribute in attributes.values()]


_FLATTENED: weakref.WeakKeyDictionary[nnx.Module, _Flattened] = weakref.WeakKeyDictionary()


def _flatten(model: nnx.Module) -> tuple[list[Any], jax.tree_util.PyTreeDef]:
    return jax.tree.flatten(model, is_leaf=lambda node: isinstance(node, nnx.Variable))


def compiler_options(backend: str) -> dict[str, bool | int | str]:
    """The options of this backend that this version of XLA knows. It rejects others when it compiles."""
    return {name: value for name, value in COMPILER_OPTIONS.get(backend, {}).items() if is_known(name, value)}


@functools.cache
def is_known(name: str, value: bool | int | str) -> bool:
    """Return whether this version of XLA knows a compiler option."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
