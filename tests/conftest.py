"""Run all tests with JAX's strictest promotion rules, four devices, and run-time checks of all shapes and types."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator

import hypothesis
import jax
import jaxtyping
import pytest
from filelock import FileLock

# A deadline of ten seconds detects hangs. It does not measure speed.
suppressed_checks = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile("short", deadline=10_000, suppress_health_check=suppressed_checks)
hypothesis.settings.register_profile(
    "long", deadline=10_000, max_examples=100_000, suppress_health_check=suppressed_checks, database=None
)
hypothesis.settings.load_profile("short")

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
with jaxtyping.install_import_hook("snax", "beartype.beartype"):
    import snax  # noqa: F401  # the hook instruments modules that are imported inside the block


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs between test workers, the processes that tests start, and later test runs."""
    folder = str(config.cache.mkdir("compiled"))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True, scope="module")
def release_memory() -> Iterator[None]:
    """Release the compiled programs of a test module after its tests. Those of all modules take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # return about 900 MB that the compiler freed to the system


@pytest.fixture
def one_ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let one test at a time use Ray. A driver without an address joins any cluster that runs on the machine."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield


@pytest.fixture
def optax_mixes() -> Iterator[None]:
    """Allow implicit dtype promotion, which Optax needs for integer step counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def as_users_see_it() -> Iterator[None]:
    """Disable the run-time type checks of the tests, so that invalid inputs reach snax's own error messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
