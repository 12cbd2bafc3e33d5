"""Calibration data and images."""
