"""JAX's persistent compilation cache."""

import os

import jax


def enable() -> None:
    """Enable the cache in `~/.cache/snax/compiled`, or in the folder that JAX is already configured to use.

    Compiling takes a second on a CPU and a minute on a TPU. JAX's cache key includes the version of jaxlib, XLA's flags
    and, on CPUs, the processor's features, so different machines can share a home directory.
    """
    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # added at run time
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "snax", "compiled"))
        # JAX's default, one second, would exclude programs for short clips.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
