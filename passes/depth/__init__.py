"""Passes that leave out, repeat or reorder blocks."""
