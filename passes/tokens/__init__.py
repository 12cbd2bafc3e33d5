"""Passes that prune tokens."""
