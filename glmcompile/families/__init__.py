"""The registry of model families: one module per family, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmcompile.errors import UnsupportedArchitectureError
from glmcompile.families import glm4v, llama, qwen2_vl
from glmcompile.families.base import Family, ModulePaths

__all__ = ["Family", "ModulePaths", "family_for", "supported"]

_FAMILIES = (glm4v.FAMILY, qwen2_vl.FAMILY, llama.FAMILY)


def supported() -> dict[str, Family]:
    """Every family by name."""
    return {family.name: family for family in _FAMILIES}


def family_for(config_json: Mapping[str, Any]) -> Family:
    """The family of a checkpoint, by the first entry of `architectures` in its config.json.

    Raises UnsupportedArchitectureError naming the architecture and those supported.
    """
    architectures = config_json.get("architectures") or ()
    by_architecture = {name: family for family in _FAMILIES for name in family.architectures}
    known = ", ".join(sorted(by_architecture))
    if not isinstance(architectures, list | tuple) or not architectures:
        raise UnsupportedArchitectureError(
            f"config.json names no architecture; expected `architectures` to hold one of: {known}"
        )
    if str(architectures[0]) not in by_architecture:
        raise UnsupportedArchitectureError(
            f"architecture {architectures[0]} is not supported; supported: {known}"
        )
    return by_architecture[architectures[0]]
