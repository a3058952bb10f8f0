"""Accuracy: what an engine answers, and how far its predictions are from a baseline's."""
