"""The components as torch modules whose inputs and outputs are the contract's ports."""

from __future__ import annotations

import abc
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.overrides import TorchFunctionMode

from glmcompile.contract import (
    BLOCK_TABLE,
    COMPUTED,
    FEATURE_ROWS,
    FEATURES,
    IMAGE_SPANS,
    KEY_CACHE,
    LOGITS_ROWS,
    PAST_LENGTHS,
    POSITIONS,
    PROCESSED,
    SEQUENCE_ENDS,
    STATE,
    STATE_SLOTS,
    TOKEN_IDS,
    VALUE_CACHE,
    Component,
    Computed,
)
from glmcompile.export.attention import Tracing, tracing
from glmcompile.export.recurrent import recurrent_layers
from glmcompile.export.replacements import GridInputs, replaced

# Sizes of the traced example. Distinct, and above 1, so that no dimension is taken for a constant
# or for another one.
EXAMPLE_SIZES = {
    "tokens": 19,
    "image_tokens": 12,
    "sequences": 3,
    "sequences_plus_1": 4,
    "max_blocks": 4,
    "rows": 5,
    "num_blocks": 7,
    "block_size": 32,
    "num_slots": 6,
}
_ORDINARY = inspect.Parameter.POSITIONAL_OR_KEYWORD

# Dimensions that nothing but the attention operator sees; two symbols for every cache would make
# tracing several times slower.
UNTRACED = {"sequences", "sequences_plus_1", "max_blocks", "num_blocks", "block_size", "num_slots"}


@dataclass(frozen=True)
class FeatureForm:
    """How `get_image_features` hands out features, so that a decoder is given them likewise.

    output: the class of what it returns. listed: one tensor for each image. deepstack: further
    features for each token, added to hidden states of later layers.
    """

    output: type[Any]
    listed: bool
    deepstack: int = 0
    deepstack_listed: bool = False

    @classmethod
    def of(cls, output: Any) -> FeatureForm:
        """The form of what a model's `get_image_features` returned."""
        deeper = getattr(output, "deepstack_features", None) or []
        return cls(
            type(output),
            isinstance(output.pooler_output, list | tuple),
            len(deeper),
            bool(deeper) and isinstance(deeper[0], list | tuple),
        )

    def join(self, output: Any) -> torch.Tensor:
        """Features of all images, [image tokens, (1 + deepstack) * hidden]."""
        parts = [_rows(output.pooler_output)]
        if self.deepstack:
            parts += [_rows(each) for each in output.deepstack_features]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def split(self, features: torch.Tensor, hidden_size: int) -> Any:
        """The inverse of `join`."""
        parts = features.split(hidden_size, dim=-1) if self.deepstack else [features]
        made = self.output(
            last_hidden_state=features,
            pooler_output=[parts[0]] if self.listed else parts[0],
        )
        if self.deepstack:
            deeper = [[each] if self.deepstack_listed else each for each in parts[1:]]
            made.deepstack_features = deeper
        return made


def _rows(features: Any) -> torch.Tensor:
    """A tensor [..., hidden], or several, as [image tokens, hidden]."""
    if isinstance(features, list | tuple):
        rows = [_rows(each) for each in features]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    return features.reshape(-1, features.shape[-1])


@dataclass(frozen=True)
class Structure:
    """What is known of the transformers model beside the contract.

    layers: module paths of each component's layers, in the order in which they run.
    uniform: components whose layers are all called alike, so that one can stand for the others.
    table, head: module paths of the token embedding and of the output layer.
    called: module paths that ran in each component.
    types: arguments of the model's forward that tell kinds of tokens apart, and what the processor
    says of an image's tokens there (0 is text).
    fixed: arguments of `get_image_features` that are no inputs of the graph, for one image.
    example: that image's arrays, by the names of the vision encoder's ports.
    patches_per_unit: rows of the encoder's layers for each patch or tile that the processor gives;
    patches_per_token: for each image token.
    """

    layers: Mapping[str, list[str]]
    uniform: frozenset[str]
    table: str
    head: str
    called: Mapping[str, frozenset[str]]
    takes_positions: bool = True
    types: Mapping[str, int] = field(default_factory=dict)
    form: FeatureForm | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    example: Mapping[str, torch.Tensor] = field(default_factory=dict)
    patches_per_unit: float = 1.0
    patches_per_token: float = 1.0


def required(model: Any) -> dict[str, None]:
    """Arguments of a model's forward that have no default and are given in another way, such as
    pixel_values."""
    parameters = inspect.signature(model.forward).parameters.items()
    return {
        name: None
        for name, each in parameters
        if each.default is each.empty and each.kind is _ORDINARY and name != "input_ids"
    }


def features_owner(model: Any) -> Any:
    """The module that computes image features; None where none does."""
    owners = (model, getattr(model, "model", None))
    return next((each for each in owners if hasattr(each, "get_image_features")), None)


def example_inputs(
    component: Component, shapes: Mapping[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, ...]:
    """Tensors of the traced example's sizes; only shapes and types matter.

    shapes: tensors of the right shapes by the ports' names; EXAMPLE_SIZES without them.
    """
    return tuple(
        torch.zeros(
            shapes[port.name].shape
            if shapes
            else [EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in port.shape],
            dtype=getattr(torch, port.dtype),
        )
        for port in component.inputs
    )


def dynamic_shapes(component: Component) -> tuple[dict[int, Any], ...]:
    """torch.export's description of the dynamic dimensions, in the order of the inputs."""
    return tuple(
        {
            axis: Dim.DYNAMIC
            for axis, size in enumerate(port.shape)
            if isinstance(size, str) and size not in UNTRACED
        }
        for port in component.inputs
    )


class TracedComponent(nn.Module, abc.ABC):
    """Takes the tensors of the component's input ports in their order."""

    def __init__(self, model: Any, structure: Structure, ports: Component) -> None:
        super().__init__()
        self.model: Any = model
        self.structure = structure
        self.ports = ports

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, list[torch.Tensor]] = {}
        for port, tensor in zip(self.ports.inputs, tensors, strict=True):
            inputs.setdefault(port.role, []).append(tensor)
        with unchecked():
            return self.run(inputs)

    @abc.abstractmethod
    def run(self, inputs: Mapping[str, list[torch.Tensor]]) -> torch.Tensor:
        """The component's output from its inputs by role, those of a role in order."""


class VisionEncoder(TracedComponent):
    """The image processor's arrays and what follows from the grids -> image features."""

    def __init__(
        self,
        model: Any,
        structure: Structure,
        ports: Component,
        computed: Sequence[Computed] = (),
    ) -> None:
        super().__init__(model, structure, ports)
        self.computed = computed

    def run(self, inputs: Mapping[str, list[torch.Tensor]]) -> torch.Tensor:
        named = {
            role: {
                port.name: tensor
                for port, tensor in zip(
                    (p for p in self.ports.inputs if p.role == role), inputs.get(role, ()),
                    strict=True,
                )
            }
            for role in (PROCESSED, COMPUTED)
        }  # fmt: skip
        grids = GridInputs(self.computed, named[COMPUTED])
        with tracing(Tracing()), grids.given(), _OneImage():
            output = features_owner(self.model).get_image_features(
                **named[PROCESSED], **self.structure.fixed, return_dict=True
            )
        assert self.structure.form is not None
        return self.structure.form.join(output)


class Decoder(TracedComponent):
    """Token ids, image features and the packed batch -> logits of the rows that are wanted."""

    def run(self, inputs: Mapping[str, list[torch.Tensor]]) -> torch.Tensor:
        caches = list(zip(inputs.get(KEY_CACHE, ()), inputs.get(VALUE_CACHE, ()), strict=True))
        batch = tuple(inputs[role][0] for role in (SEQUENCE_ENDS, PAST_LENGTHS, BLOCK_TABLE))
        features = inputs[FEATURES][0] if FEATURES in inputs else None
        spans = inputs[IMAGE_SPANS][0] if IMAGE_SPANS in inputs else None
        pools = inputs.get(STATE, [])
        slots = (inputs[STATE_SLOTS][0], *batch[:2]) if pools else ()
        with tracing(Tracing(caches, batch, spans, pools, slots)):
            return self.call(
                inputs[TOKEN_IDS][0],
                inputs[POSITIONS][0],
                inputs[LOGITS_ROWS][0],
                features,
                inputs[FEATURE_ROWS][0] if features is not None else None,
            )

    def call(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        features: torch.Tensor | None = None,
        feature_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The model's own forward on packed tokens; attention functions find the rest."""
        arguments: dict[str, Any] = {"input_ids": ids.unsqueeze(0), "use_cache": False}
        if self.structure.takes_positions:
            arguments["position_ids"] = positions.unsqueeze(-2)
        for name, kind in self.structure.types.items():
            arguments[name] = torch.zeros_like(arguments["input_ids"])
            if kind and feature_rows is not None and not torch.compiler.is_exporting():
                arguments[name][0, feature_rows] = kind
        arguments = required(self.model) | arguments
        with ExitStack() as stack:
            if features is not None:
                assert self.structure.form is not None and feature_rows is not None
                hidden = self.model.get_submodule(self.structure.table).weight.shape[1]
                output = self.structure.form.split(features, hidden)
                arguments["mm_encoder_outputs"] = {"image": output}
                stack.enter_context(_IndexedTokens(feature_rows))
            stack.enter_context(recurrent_layers())
            stack.enter_context(selected_rows(self.model, self.structure.head, rows))
            logits = self.model(**arguments).logits
        return logits.squeeze(0) if logits.ndim == 3 else logits


@contextmanager
def selected_rows(model: nn.Module, head: str, rows: torch.Tensor) -> Iterator[None]:
    """Let the output layer see only these of the packed tokens, as [rows, hidden]."""

    def select(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = arguments[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, rows), *arguments[1:])

    def select_squeezed(
        module: nn.Module, arguments: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        return (arguments[0].squeeze(0).index_select(0, rows), *arguments[1:])

    packed = torch.compiler.is_exporting()
    hook = model.get_submodule(head).register_forward_pre_hook(
        select_squeezed if packed else select
    )
    try:
        yield
    finally:
        hook.remove()


class _IndexedTokens(TorchFunctionMode):
    """Puts image features at `rows` where the model puts them under a mask of image tokens, and
    takes or changes hidden states there where it does so under such a mask.

    The mask would be searched for at run time, and a boolean index traced as a loop.
    """

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self._rows = rows

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if function is torch.Tensor.masked_scatter:
            data, _, source = arguments
            return self._scattered(data, source)
        if function is torch.Tensor.__getitem__ and _is_token_mask(*arguments):
            return arguments[0].squeeze(0).index_select(0, self._rows)
        if function is torch.Tensor.__setitem__ and _is_token_mask(*arguments[:2]):
            data, _, source = arguments
            return data.copy_(self._scattered(data, source))
        return function(*arguments, **(named or {}))

    def _scattered(self, data: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """data [1, tokens, channels] with source [image tokens, channels] at `rows`."""
        tokens = data.squeeze(0)
        made = torch.onnx.ops.symbolic(
            "ScatterND",
            (tokens, self._rows.unsqueeze(-1), source.reshape(-1, source.shape[-1])),
            dtype=data.dtype,
            shape=tokens.shape,
        )
        return made.unsqueeze(0)


def _is_token_mask(data: torch.Tensor, index: Any) -> bool:
    """Whether an index picks tokens of data [1, tokens, channels] by a boolean mask."""
    if isinstance(index, tuple) and index[1:] in ((), (slice(None),)):
        index = index[0]
    return (
        isinstance(index, torch.Tensor)
        and index.dtype == torch.bool
        and index.ndim == 2
        and data.ndim == 3
    )


class _OneImage(TorchFunctionMode):
    """Features of the only image are not split by image: their number is known at run time."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        if function in (torch.split, torch.Tensor.split):
            sizes = arguments[1] if len(arguments) > 1 else next(iter((named or {}).values()))
            if isinstance(sizes, list | tuple) and len(sizes) == 1:
                return (arguments[0],)
        return function(*arguments, **(named or {}))


@contextmanager
def unchecked() -> Iterator[None]:
    """Let the model not compare counts of image tokens and features, which are the runtime's
    business and not known while it is traced."""
    with replaced({"torch_compilable_check": lambda *arguments, **named: None}):
        yield
