"""Model weights: Orbax checkpoints, PyTorch and safetensors files, tensor names, and downloads from the hub."""
