"""Modules that `import snax` and `snax --help` load."""

import subprocess
import sys

SLOW = {
    "torch",
    "snac",
    "safetensors",
    "huggingface_hub",
    "matplotlib",
    "soundfile",
    "scipy.signal",
    "orbax",
    "tensorstore",
}

USE_EVERY_NAME = """
import sys, jax, flax.nnx
before = set(sys.modules)
import snax
for name in snax.__all__:
    getattr(snax, name)
print(*set(sys.modules) - before)
"""


def modules_after(code: str) -> set[str]:
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return set(output.split())


def test_public_names_load_few_modules() -> None:
    """All public names together load JAX, flax and small packages only."""
    new = modules_after(USE_EVERY_NAME)
    assert "snax.codec.model" in new
    assert not new & SLOW
    packages = {name.partition(".")[0] for name in new}
    assert packages <= {"snax", "jaxtyping", "wadler_lindig", "filelock", "lazy_loader"} | set(sys.stdlib_module_names)


def test_library_imports_without_torch() -> None:
    code = "import sys; sys.modules.update(torch=None, snac=None, safetensors=None); import snax; print(snax.SNAC)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_loads_no_heavy_module() -> None:
    """`snax --help` and the help of each subcommand start without JAX."""
    code = """
import contextlib, io, sys
from snax.cli import app, main
with contextlib.redirect_stdout(io.StringIO()):
    for command in ([], ["--version"], *([name] for name in app if not name.startswith("-"))):
        assert main([*command, *([] if command == ["--version"] else ["--help"])]) == 0
print(*sys.modules)
"""
    loaded = modules_after(code)
    assert {"snax.extract.command", "snax.train.command", "snax.files.command", "snax.weights.command"} <= loaded
    assert not loaded & (SLOW - {"soundfile"} | {"jax", "flax", "optax", "pyarrow"})
