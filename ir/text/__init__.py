"""Graphs as text that parses back."""
