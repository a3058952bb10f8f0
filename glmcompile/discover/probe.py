"""One run of a model on parameters without storage: which modules ran, in which order, and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from glmcompile.export.attention import AttentionCall

_HIDDEN = "hidden_states"


@dataclass
class Trail:
    """What ran.

    called: module paths. layers: paths of elements of the model's outermost lists of modules, in
    order. arguments: of each layer, by which tensors it was called beside its input.
    takes_inner: whether somebody asked for what inner layers gave, or changes it in between.
    """

    called: set[str] = field(default_factory=set)
    layers: list[str] = field(default_factory=list)
    arguments: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    takes_inner: bool = False
    _given: Any = None
    _kept: list[Any] = field(default_factory=list)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Record the modules of a model that run in the block."""
        layers = {path: layer for path, layer in _elements(model)}
        hooks = []
        for path, module in model.named_modules():
            if path in layers:
                hook = self._layer(path)
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                hooks.append(module.register_forward_hook(self._after))
            hook = self._module(path)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for each in hooks:
                each.remove()

    def _module(self, path: str) -> Any:
        def record(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.called.add(path)
            wanted = named.get("output_hidden_states")
            self.takes_inner |= wanted is not None and wanted is not False

        return record

    def _layer(self, path: str) -> Any:
        def record(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if path not in self.arguments:
                self.layers.append(path)
            hidden = positional[0] if positional else named.get(_HIDDEN)
            if self._given is not None and hidden is not self._given:
                self.takes_inner = True
            given = [*enumerate(positional[1:]), *named.items()]
            self._kept += [value for _, value in given]  # an id is one's own while one lives
            self.arguments[path] = tuple(
                (name, _identity(value)) for name, value in given if name != _HIDDEN
            )

        return record

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._given = output[0] if isinstance(output, tuple) else output
        self._kept.append(self._given)

    def is_uniform(self, model: nn.Module, calls: list[AttentionCall]) -> bool:
        """Whether all layers are called with the same tensors and attend in the same way, and only
        the last one's result is used."""
        if self.takes_inner:
            return False
        attended: dict[str, list[Any]] = {path: [] for path in self.layers}
        paths = {id(module): path for path, module in model.named_modules()}
        for call in calls:
            path = paths[id(call.module)]
            layer = next((each for each in self.layers if path.startswith(f"{each}.")), None)
            if layer is not None:
                attended[layer].append((call.shape, call.mask, call.cross, call.segments))
        first = self.layers[0] if self.layers else ""
        return all(
            self.arguments[each] == self.arguments[first] and attended[each] == attended[first]
            for each in self.layers
        )


def _identity(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(_identity(each) for each in value)
    return id(value) if isinstance(value, torch.Tensor) else repr(value)[:100]


def _elements(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Elements of the lists of modules that are in no other."""
    outer: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(path.startswith(f"{o}.") for o in outer):
            outer.append(path)
            for index, each in enumerate(module):
                yield f"{path}.{index}", each


def path_of(model: nn.Module, module: nn.Module | None) -> str:
    """The path of a module; "" for one that is not there."""
    return next((path for path, each in model.named_modules() if each is module), "")
