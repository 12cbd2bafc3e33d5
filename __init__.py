"""Graphwright: compiler-style graph rewriting for transformer models."""
