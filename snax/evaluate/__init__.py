"""Evaluation of a codec: `metrics` of a clip, `scores` of a model, and an HTML `report` of clips."""
