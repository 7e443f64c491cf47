"""Compare snax with the PyTorch reference on one NVIDIA GPU: `python -m benchmarks.gpu BLOCK`.

`parity` runs the full-size parity tests on the GPU. It also counts the tokens that differ from the reference's float64
tokens: for clips alone, in batches and in packed rows, and for each matmul precision. `speed` times snax, torch and
torch.compile. `scale` times packed rows and the extraction of a corpus. `streams` times pools of streams, `training`
training steps, both beside torch. All write benchmarks/gpu.json.
Weights are random, scaled so that the model behaves like a trained one. Needs jax[cuda12], torch with CUDA, snac,
pytest and pytest-xdist.
"""

import argparse
import importlib
import os
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("block", choices=["parity", "speed", "scale", "streams", "training"])
    block = parser.parse_args().block
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # leave memory for torch
    with tempfile.TemporaryDirectory() as folder:
        getattr(importlib.import_module(f"benchmarks.gpu.{block}"), block)(Path(folder))


if __name__ == "__main__":
    main()
