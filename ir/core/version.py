"""The version of this package: what an artifact says it was made by."""

__version__ = "0.1.0"
