"""A run: from a model to a checked artifact, and what is done with artifacts."""
