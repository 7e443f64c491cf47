"""Every test runs under the strictest rules that JAX has, on four devices, with all shapes and types checked."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator

import hypothesis
import jax
import jaxtyping
import pytest

# Ten seconds is no measure of speed: it is what no input may take.
checks = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile("short", deadline=10_000, suppress_health_check=checks)
hypothesis.settings.register_profile(
    "long", deadline=10_000, max_examples=100_000, suppress_health_check=checks, database=None
)
hypothesis.settings.load_profile("short")

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
with jaxtyping.install_import_hook("snax", "beartype.beartype"):
    import snax  # noqa: F401  # imported here so that the hook is on it


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs between the workers, the processes that tests start, and later runs of the tests."""
    folder = str(config.cache.mkdir("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True, scope="module")
def memory_of_one_module() -> Iterator[None]:
    """Release the programs of a module when its tests are done: all of them together take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # the C library keeps what compilers freed, about 900 MB


@pytest.fixture
def optax_mixes() -> Iterator[None]:
    """Optax mixes counts and floats, which tests forbid otherwise."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def as_users_see_it() -> Iterator[None]:
    """Without the type checks of the test run, which a user does not have: bad input meets our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
