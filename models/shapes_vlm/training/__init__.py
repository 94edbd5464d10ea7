"""Trains shapes-vlm from scratch on CPU: `python -m models.shapes_vlm.training --out DIR --seed S`."""
