"""What `import snax` brings along."""

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


def test_import_brings_only_what_every_user_needs() -> None:
    code = "import sys, jax, flax.nnx; before = set(sys.modules); import snax; print(*set(sys.modules) - before)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    new = set(output.split())
    assert "snax.codec.model" in new
    assert not new & SLOW
    # Nothing but ourselves and two small pure packages beyond JAX and flax: so no slower than they are.
    assert {name.partition(".")[0] for name in new} <= {"snax", "jaxtyping", "wadler_lindig", "filelock"} | set(
        sys.stdlib_module_names
    )


def test_library_names_no_torch_outside_of_functions() -> None:
    code = "import sys; sys.modules.update(torch=None, snac=None, safetensors=None); import snax; print(snax.SNAC)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
