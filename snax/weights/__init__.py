"""Checkpoints: Orbax, PyTorch and safetensors files, names of tensors, the hub."""
