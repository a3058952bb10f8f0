"""Trace a checkpoint's components into onnx_ir models without loading its weights."""

from __future__ import annotations

import logging
import traceback
import warnings
from pathlib import Path

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
from glmcompile.contract import VISION, Component
from glmcompile.errors import ExportError, brief
from glmcompile.export.attention import PAGED_ATTENTION, VARLEN_ATTENTION
from glmcompile.export.cleanup import NameDimensions, simplify
from glmcompile.export.components import (
    Decoder,
    TracedComponent,
    VisionEncoder,
    dynamic_shapes,
    example_inputs,
)
from glmcompile.export.convolution import ConvolutionToLinear
from glmcompile.export.linear import CanonicalizeLinear
from glmcompile.export.repeat import repeat_layer, shorten
from glmcompile.export.skeleton import build_skeleton
from glmcompile.export.weights import bind_weights

OPSET = 23


def export_component(checkpoint: Checkpoint, component: str) -> ir.Model:
    """One component ("vision_encoder" or "decoder") as an ONNX graph.

    The graph's inputs are the contract's ports; linear layers are com.glmcompile::Linear nodes;
    parameters are initializers under their names in the transformers module, whose values are read
    from the checkpoint only when written. Raises ExportError naming the component.
    """
    if component not in checkpoint.model.components:
        raise ExportError(
            f"{checkpoint.architecture} has no component {component}; "
            f"its components: {', '.join(checkpoint.model.components)}"
        )
    ports = checkpoint.model.components[component]
    model, layers = _simplified(checkpoint, component, ports)
    if layers:
        try:
            repeat_layer(model, layers)
        except ExportError:  # its layers hand on more than a hidden state: all are traced
            model, _ = _simplified(checkpoint, component, ports, whole=True)
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
    checkpoint: Checkpoint, component: str, ports: Component, whole: bool = False
) -> tuple[ir.Model, list[str]]:
    """The component traced and simplified, and all of its layers if only some are in it.

    whole: trace every layer, alike or not.
    """
    model, layers = _trace(checkpoint, component, ports, whole)
    CanonicalizeLinear()(model)
    simplify(model)
    NameDimensions({port.name: port.shape for port in ports.inputs})(model)
    return model, layers


def _trace(
    checkpoint: Checkpoint, component: str, ports: Component, whole: bool
) -> tuple[ir.Model, list[str]]:
    """The exporter's graph as it comes, parameters renamed as in the module and without values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    structure, vision = checkpoint.structure, checkpoint.model.vision
    attention = VARLEN_ATTENTION if component == VISION else PAGED_ATTENTION
    skeleton = build_skeleton(checkpoint, mode, attention)
    layers: list[str] = []
    if component in structure.uniform and not whole:
        layers = shorten(skeleton, structure.layers[component])
    module: TracedComponent
    if component == VISION:
        assert vision is not None
        module = VisionEncoder(skeleton, structure, ports, vision.computed)
    else:
        module = Decoder(skeleton, structure, ports)
    module.eval()
    with mode:
        shapes = structure.example if component == VISION else None
        inputs = example_inputs(ports, shapes)
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
                dynamic_shapes=(dynamic_shapes(ports),),
                input_names=[port.name for port in ports.inputs],
                output_names=[port.name for port in ports.outputs],
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except Exception as error:  # the exporter raises whatever the traced code raises
        raise ExportError(
            f"{component}: torch.onnx could not export {checkpoint.model_class.__name__}: "
            f"{_cause(error)}"
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


def _cause(error: BaseException) -> str:
    """What the exporter's error is about, and where in transformers' code it arose."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    frames = traceback.extract_tb(error.__traceback__)
    places = [each for each in frames if "transformers" in each.filename] or frames
    where = f" at {Path(places[-1].filename).name}:{places[-1].lineno}" if places else ""
    return f"{brief(error)}{where}"
