"""Trainers of the models that ship as ``zoo:tiny-*``."""
