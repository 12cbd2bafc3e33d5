"""Folders of transformers: classes, weights, inputs, caches."""
