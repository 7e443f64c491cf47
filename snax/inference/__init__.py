"""Ways to run the codec: packing and streaming."""
