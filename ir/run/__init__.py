"""Graphs on real tensors: sweeps, statistics, batches, verification."""
