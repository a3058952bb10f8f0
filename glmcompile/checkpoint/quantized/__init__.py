"""Weights that were quantized before they were published, as the values that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from glmcompile.checkpoint.quantized import awq, compressed, fp8, gptq
from glmcompile.checkpoint.sources import Dequantized, Source
from glmcompile.errors import CheckpointError

# quant_method of config.json -> the tensors stored for a layer -> its weight.
METHODS: dict[str, Callable[[Mapping[str, Source], Mapping[str, Any]], dict[str, Source]]] = {
    "awq": awq.weights,
    "compressed-tensors": compressed.weights,
    "fbgemm_fp8": compressed.weights,  # float8 with a scale for each row, under the same names
    "fp8": fp8.weights,
    "gptq": gptq.weights,
}
ADVICE = {
    "bitsandbytes": "bitsandbytes quantizes when a model is loaded; the checkpoint that it was "
    "loaded from is the one to compile",
}


def method_of(settings: Any, where: Path) -> str:
    """The name of the method in a quantization_config.

    Raises CheckpointError for one that is not read.
    """
    if not isinstance(settings, Mapping):
        settings = {"quant_method": f"{settings}, without settings"}
    method = str(settings.get("quant_method", ""))
    if not method and "config_groups" in settings:
        method = "compressed-tensors"
    if method not in METHODS:
        advice = ADVICE.get(method.lower(), f"{', '.join(METHODS)} are read")
        raise CheckpointError(
            f"{where} holds weights already quantized ({method or 'by no named method'}); "
            f"{advice}. Give the original checkpoint in bfloat16, float16 or float32"
        )
    return method


def dequantized(
    stored: Mapping[str, Source], settings: Mapping[str, Any], where: Path
) -> tuple[dict[str, Source], list[str]]:
    """Stored tensors with each quantized layer's replaced by its weight, and notes for the user.

    settings: quantization_config of config.json. where: the checkpoint, for messages.
    Raises CheckpointError for methods and forms that are not read, and damaged layers.
    """
    method = method_of(settings, where)
    result = METHODS[method](stored, settings)
    count = sum(isinstance(source, Dequantized) for source in result.values())
    if not count:
        return result, []
    return result, [
        f"{where.resolve().name}: {count} weights are quantized ({method}). They are compiled from "
        "their dequantized values: what that quantization lost stays lost, and accuracy is "
        "measured against it. The original checkpoint gives a more exact engine."
    ]
