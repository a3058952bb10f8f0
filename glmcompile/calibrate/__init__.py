"""Calibration: real samples through the float32 graphs, largest magnitudes per channel out."""
