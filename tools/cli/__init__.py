"""The command ``optimize-model``."""
