"""JAX's persistent compilation cache."""

import os

import jax


def enable() -> None:
    """Keep compiled programs for later processes, unless JAX was given a folder for them.

    Compiling takes a second on a CPU and a minute on a TPU. The key of JAX's cache includes jaxlib's version, XLA's
    flags and, on CPUs, the processor's features, so machines of several kinds can share a home directory.
    """
    folder: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds it as it runs
    if folder is None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "snax", "compiled"))
        # JAX's default, a second, leaves out programs for short clips.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
