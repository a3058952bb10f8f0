"""Torch modules to ONNX components: traced without weights, checked against torch."""

from glmcompile.export.exporter import export_component
from glmcompile.export.save import save_components

__all__ = ["export_component", "save_components"]
