"""Graphs, views, vocabulary, own ops, structure, moves, sweep, verification."""
