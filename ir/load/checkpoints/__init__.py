"""Checkpoints as other tools quantized them, and how their weights are read."""
