"""Serving an engine: scheduling, paged KV cache, sampling, text and images in and out; no torch."""
