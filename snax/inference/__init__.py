"""Ways to run the codec: packed rows and streams."""
