"""Benches and records: for who changes the package, not for who uses it."""
