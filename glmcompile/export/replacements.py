"""What is replaced in transformers and torch while a model is probed or traced.

Vision encoders compute positions, boundaries and interpolation from the images' grids with loops
that no graph can hold. Probed, those functions are recorded and matched with the rules that compute
the same in NumPy; traced, their results are inputs of the graph.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import vision_utils

from glmcompile.contract import Computed, Rule
from glmcompile.errors import UnsupportedArchitectureError
from glmcompile.rules import GRID_RULES

# Functions of vision_utils, the rule that computes the same, and the names of the results.
_GRID_FUNCTIONS = {
    "get_vision_cu_seqlens": ("segment_boundaries", ("cu_seqlens",)),
    "get_vision_attention_seqlens": ("segment_boundaries", ("cu_seqlens",)),
    "get_vision_position_ids": ("patch_positions", ("position_ids",)),
    "get_vision_window_index": ("windows", ("window_index", "cu_window_seqlens")),
    "get_vision_interpolation_indices_and_weights": (
        "position_taps", ("position_cells", "position_weights"),
    ),
    "get_vision_nearest_position_ids": ("nearest_positions", ("position_ids",)),
}  # fmt: skip
_GRIDS = ("grid_thw", "target_sizes")
# A flash kernel's grid is bounded by the longest segment; the symbolic attention does not read it.
_LONGEST = 1


@contextmanager
def replaced(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace functions by their names in every module of transformers' models that has them."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if not name.startswith("transformers.models."):
                continue
            for function, replacement in functions.items():
                if function in vars(module):
                    stack.enter_context(mock.patch.object(module, function, replacement))
        yield


@dataclass
class GridRecorder:
    """Runs the functions as they are and keeps what they gave, and which rule gives the same.

    values: the arrays of each entry of `computed`, for the images that the probe ran on.
    """

    computed: list[Computed] = field(default_factory=list)
    values: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        functions = {
            name: self._recorded(getattr(vision_utils, name), *rule)
            for name, rule in _GRID_FUNCTIONS.items()
        }
        sampled = mock.patch.object(torch.nn.functional, "grid_sample", self._sampled)
        with replaced(functions), sampled:
            yield

    def of(self, rule: Rule) -> tuple[np.ndarray, ...]:
        """What a rule gave."""
        found = zip(self.computed, self.values, strict=True)
        return next(values for each, values in found if each.rule == rule)

    def _recorded(
        self, function: Callable[..., Any], rule: str, outputs: tuple[str, ...]
    ) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def recorded(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            bound = signature.bind(*arguments, **named).arguments
            grids = next(bound[name] for name in _GRIDS if name in bound)
            plain = {
                name: value
                for name, value in bound.items()
                if isinstance(value, bool | int | float | str)
            }
            tensors = [each for each in _as_tuple(result) if isinstance(each, torch.Tensor)]
            self._add(grids, rule, plain, outputs, tensors)
            return result

        return recorded

    def _sampled(self, table: torch.Tensor, grid: torch.Tensor, *rest: Any, **named: Any) -> Any:
        """F.grid_sample of a learned position embedding at the places of patches."""
        options = inspect.signature(_GRID_SAMPLE).bind(table, grid, *rest, **named).arguments
        places = [each for each in self.computed if each.rule.name == "patch_positions"]
        if not places or table.shape[-1] != table.shape[-2] or isinstance(grid, _fake()):
            raise UnsupportedArchitectureError(
                "the vision encoder samples a grid at places that do not follow from images' sizes"
            )
        arguments = {
            "num_grid_per_side": table.shape[-1],
            "mode": options.get("mode", "bilinear"),
            "align_corners": bool(options.get("align_corners", False)),
            "padding": options.get("padding_mode", "zeros"),
            **places[-1].rule.arguments,
        }
        outputs = ("position_cells", "position_weights")
        computed = Computed(Rule("position_taps", arguments), outputs)
        self.computed.append(computed)
        self.values.append(GRID_RULES["position_taps"](self._grids, **arguments))
        return _GRID_SAMPLE(table, grid, *rest, **named)

    def _add(
        self,
        grids: torch.Tensor,
        rule: str,
        arguments: dict[str, Any],
        outputs: tuple[str, ...],
        results: Sequence[torch.Tensor],
    ) -> None:
        self._grids = grids.numpy().astype(np.int64)
        values = GRID_RULES[rule](self._grids, **arguments)
        for name, value, expected in zip(outputs, values, results, strict=True):
            wanted = expected.numpy()
            if value.shape != wanted.shape or not np.allclose(value, wanted, rtol=0, atol=1e-5):
                raise UnsupportedArchitectureError(
                    f"{name}: the rule {rule} with {arguments} does not give what transformers "
                    "computes from the images' grids"
                )
        self.computed.append(Computed(Rule(rule, arguments), outputs))
        self.values.append(values)


def unique_outputs(computed: Sequence[Computed]) -> tuple[Computed, ...]:
    """Each rule once, the names of its results told apart where two have the same."""
    found: list[Computed] = []
    names: set[str] = set()
    for each in computed:
        if any(other.rule == each.rule for other in found):
            continue
        outputs = each.outputs
        number = 1
        while names & set(outputs):
            number += 1
            outputs = tuple(f"{name}_{number}" for name in each.outputs)
        names |= set(outputs)
        found.append(Computed(each.rule, outputs))
    return tuple(found)


@dataclass
class GridInputs:
    """Gives the graph's inputs in place of what the functions would compute.

    tensors: by the names of `computed`'s outputs.
    """

    computed: Sequence[Computed]
    tensors: Mapping[str, torch.Tensor]

    @contextmanager
    def given(self) -> Iterator[None]:
        functions = {
            name: self._given(getattr(vision_utils, name), name, rule)
            for name, (rule, _) in _GRID_FUNCTIONS.items()
        }
        sampled = mock.patch.object(torch.nn.functional, "grid_sample", self._sampled)
        with replaced(functions), sampled:
            yield

    def _given(self, function: Callable[..., Any], name: str, rule: str) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def given(*arguments: Any, **named: Any) -> Any:
            bound = signature.bind(*arguments, **named).arguments
            plain = {
                key: value
                for key, value in bound.items()
                if isinstance(value, bool | int | float | str)
            }
            tensors = self._of(Rule(rule, plain))
            if name == "get_vision_attention_seqlens":
                return tensors[0], _LONGEST
            return tensors[0] if len(tensors) == 1 else tensors

        return given

    def _of(self, rule: Rule) -> tuple[torch.Tensor, ...]:
        outputs = next(each.outputs for each in self.computed if each.rule == rule)
        return tuple(self.tensors[name] for name in outputs)

    def _sampled(self, table: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        """The position embedding of each patch, [1, channels, patches, 1]: its cells, weighed."""
        taps = next(each for each in self.computed if each.rule.name == "position_taps")
        cells, weights = (self.tensors[name] for name in taps.outputs)
        channels = table.shape[1]
        rows = torch.onnx.ops.symbolic(
            "com.glmcompile::EmbeddingBag",
            (table.squeeze(0).permute(1, 2, 0).reshape(-1, channels), cells, weights),
            dtype=table.dtype,
            shape=(cells.shape[0], channels),
            version=1,
        )
        return rows.permute(1, 0).unsqueeze(-1).unsqueeze(0)


_GRID_SAMPLE = torch.nn.functional.grid_sample


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _fake() -> type[torch.Tensor]:
    from torch._subclasses.fake_tensor import FakeTensor

    return FakeTensor
