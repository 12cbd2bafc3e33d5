"""Passes that make linears smaller, and those that compensate."""
