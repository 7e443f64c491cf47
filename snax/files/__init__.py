"""The codec on files: `snax encode`, `decode`, `reconstruct` and `info`."""
