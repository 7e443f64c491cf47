"""How good a codec is on given audio: `metrics` of a clip, `scores` of a model, and their `report`."""
