"""Patterns, rules, the driver that applies them, and cleaning."""
