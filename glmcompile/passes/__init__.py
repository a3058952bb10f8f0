"""Graph rewrites on exported components, one per file; each says what it requires and ensures."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter import onnx_fusions

from glmcompile.passes.fold_offsets import FoldOffsets
from glmcompile.passes.merge_linears import MergeLinears
from glmcompile.passes.rotary import FuseRotary
from glmcompile.passes.select_rows import SelectRows


def simplify(model: ir.Model) -> None:
    """Run the rewrites that hold for every target; operators stay those ONNX Runtime defines."""
    ir.passes.Sequential(FoldOffsets(), FuseRotary(), MergeLinears())(model)
    onnx_fusions.fuse(model)  # RMSNormalization
    SelectRows()(model)
