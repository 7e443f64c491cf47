"""Training: configuration (`config`), losses (`losses`), discriminators (`discriminators`), weight normalization
(`weight_norm`), the training step (`step`) and the training loop (`run`)."""
