"""Passes that change no output."""
