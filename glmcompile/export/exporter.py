"""Trace a checkpoint's components into onnx_ir models without loading its weights."""

from __future__ import annotations

import logging
import warnings

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from glmcompile.checkpoint import Checkpoint
from glmcompile.errors import ExportError
from glmcompile.export.cleanup import NameDimensions, simplify
from glmcompile.export.components import (
    COMPONENTS,
    Signature,
    dynamic_shapes,
    example_inputs,
    signature,
)
from glmcompile.export.convolution import ConvolutionToLinear
from glmcompile.export.linear import CanonicalizeLinear
from glmcompile.export.repeat import repeat_layer, shorten
from glmcompile.export.skeleton import build_skeleton
from glmcompile.export.weights import bind_weights

OPSET = 23


def export_component(checkpoint: Checkpoint, component: str) -> ir.Model:
    """One component ("vision_encoder", "embedding" or "decoder") as an ONNX graph.

    The graph follows the component's signature; linear layers are com.glmcompile::Linear nodes;
    parameters are initializers under their names in the transformers module, whose values are read
    from the checkpoint only when written. Raises ExportError naming the component.
    """
    if component not in checkpoint.family.components:
        raise ExportError(
            f"a {checkpoint.family.name} model has no component {component}; "
            f"its components: {', '.join(checkpoint.family.components)}"
        )
    spec = signature(checkpoint.family, checkpoint.model, component)
    model, layers = _simplified(checkpoint, component, spec)
    if layers:
        try:
            repeat_layer(model, layers)
        except ExportError:  # its layers hand on more than a hidden state: all are traced
            model, _ = _simplified(checkpoint, component, spec, whole=True)
    bind_weights(model, checkpoint, component)
    ConvolutionToLinear()(model)
    RemoveUnusedNodesPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    CommonSubexpressionEliminationPass()(model)
    NameFixPass()(model)
    ClearMetadataAndDocStringPass()(model)
    model.graph.name = component
    model.producer_name, model.producer_version = "glmcompile", None
    return model


def _simplified(
    checkpoint: Checkpoint, component: str, spec: Signature, whole: bool = False
) -> tuple[ir.Model, list[str]]:
    """The component traced and simplified, and all of its layers if only some are in it.

    whole: trace every layer, alike or not.
    """
    model, layers = _trace(checkpoint, component, spec, whole)
    CanonicalizeLinear()(model)
    simplify(model)
    NameDimensions({name: shape for name, (_, shape) in spec.inputs.items()})(model)
    return model, layers


def _trace(
    checkpoint: Checkpoint, component: str, spec: Signature, whole: bool
) -> tuple[ir.Model, list[str]]:
    """The exporter's graph as it comes, parameters renamed as in the module and without values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    skeleton = build_skeleton(checkpoint, mode)
    root = checkpoint.family.modules.layered(component)
    layers = shorten(skeleton, root) if root is not None and not whole else []
    module = COMPONENTS[component](skeleton, checkpoint.family, spec).eval()
    with mode:
        inputs = example_inputs(spec)
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    try:
        exporter_log.setLevel(logging.ERROR)  # it warns that torchvision is not installed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                dynamic_shapes=(dynamic_shapes(spec),),
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the traced code raises
        raise ExportError(
            f"{component}: torch.onnx could not export {checkpoint.model_class.__name__}: {error}"
        ) from error
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    model = program.model
    for name, value in list(model.graph.initializers.items()):
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
        value.name = name.removeprefix("model.")
    return model, layers
