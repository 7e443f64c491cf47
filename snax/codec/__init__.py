"""The network: configuration, layers, quantizer and the model around them."""
