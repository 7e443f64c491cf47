"""The network: configuration, layers, quantizer and model."""
