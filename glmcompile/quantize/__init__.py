"""Quantization schemes and the layout of quantized weights."""
