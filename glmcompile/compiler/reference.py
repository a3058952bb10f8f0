"""What transformers computes: its modules, eager, in float32, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glmcompile.checkpoint import Checkpoint
from glmcompile.compiler.activations import Activations
from glmcompile.compiler.calls import OUTPUTS, TORCH
from glmcompile.compiler.samples import ImageInputs, Sample, position_ids_of
from glmcompile.contract import DECODER, PROCESSED, VISION
from glmcompile.errors import GlmcompileError, UnsupportedArchitectureError, brief
from glmcompile.export.components import Structure, features_owner, required, selected_rows
from glmcompile.export.skeleton import EAGER, build_skeleton

# Bytes from which a parameter outside the layers is held only while its module runs.
_LARGE = 16 << 20


def layer_count(checkpoint: Checkpoint) -> int:
    """How many layers `compute` runs."""
    return sum(len(layers) for layers in checkpoint.structure.layers.values())


def compute(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    values: Activations,
    advance: Callable[[int], None] = lambda done: None,
    *,
    layers: bool = True,
    rows: NDArray[np.int64] | None = None,
) -> None:
    """Write what torch gives for the samples to `values`, as calls named TORCH.

    Float32 [tokens or patches of all samples, channels]: the output of each component under its
    name in the graph, and of each layer under its module path. A layer's weights are read when it
    runs and let go after; samples share each pass, so that they are read once.
    advance: told how many layers are done. layers: whether the layers' outputs are wanted, too.
    rows: of the samples' packed tokens those whose logits are wanted; None for all.
    """
    try:
        _compute(checkpoint, samples, values if layers else None, values, advance, rows)
    except (GlmcompileError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever the model's code raises
        raise UnsupportedArchitectureError(
            f"{checkpoint.architecture} cannot be compiled: transformers' own model fails on the "
            f"samples that are compared ({brief(error)})"
        ) from error


@torch.inference_mode()
def _compute(
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    of_layers: Activations | None,
    values: Activations,
    advance: Callable[[int], None],
    rows: NDArray[np.int64] | None,
) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model: Any = build_skeleton(checkpoint, mode, EAGER)
    streamed = _Streamed(checkpoint, model, of_layers, advance)
    structure = checkpoint.structure
    features = None
    images = [image for each in samples for image in each.images]
    if images:
        assert structure.form is not None
        owner = features_owner(model)
        with streamed(structure.layers[VISION], None):
            parts = [
                structure.form.join(owner.get_image_features(**arguments, return_dict=True))
                for arguments in _together(checkpoint, images)
            ]
        features = torch.cat(parts).float()
        values.write(TORCH, OUTPUTS[VISION], features.numpy())
    batch = _padded(checkpoint, samples, structure)
    if features is not None:
        hidden = checkpoint.model.hidden_size
        output = structure.form.split(features, hidden)  # type: ignore[union-attr]
        batch.arguments["mm_encoder_outputs"] = {"image": output}
    wanted = batch.tokens if rows is None else batch.tokens[torch.from_numpy(rows)]
    with (
        streamed(structure.layers[DECODER], batch.tokens),
        selected_rows(model, structure.head, wanted),
    ):
        logits = model(**required(model), **batch.arguments).logits
    values.write(TORCH, OUTPUTS[DECODER], logits.reshape(-1, logits.shape[-1]).numpy())


def _together(
    checkpoint: Checkpoint, images: Sequence[ImageInputs]
) -> list[dict[str, torch.Tensor]]:
    """Arguments of `get_image_features` for all images: in one call where their arrays can be
    joined, and in a call for each otherwise."""
    names = [port.name for port in checkpoint.model.encoder.having(PROCESSED)]
    each = [_arguments(image, (*names, *checkpoint.structure.fixed)) for image in images]
    joined = all(a[name].shape[1:] == each[0][name].shape[1:] for a in each for name in a)
    calls = (
        [{name: np.concatenate([a[name] for a in each]) for name in each[0]}] if joined else each
    )
    return [{name: torch.from_numpy(value) for name, value in call.items()} for call in calls]


def _arguments(image: ImageInputs, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    inputs, grid = image.inputs, np.array([image.grid_thw], np.int64)
    return {name: inputs.get(name, grid) for name in names}


@dataclass(frozen=True)
class _Batch:
    """Arguments of the model's forward, and which of its rows are tokens and not padding."""

    arguments: dict[str, Any]
    tokens: torch.Tensor


def _padded(checkpoint: Checkpoint, samples: Sequence[Sample], structure: Structure) -> _Batch:
    """The samples as a batch padded on the right, where no token sees the padding."""
    lengths = [len(each.token_ids) for each in samples]
    width = max(lengths)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    positions = torch.zeros(checkpoint.model.position_axes, len(samples), width, dtype=torch.int64)
    for row, sample in enumerate(samples):
        ids[row, : lengths[row]] = torch.from_numpy(sample.token_ids)
        mask[row, : lengths[row]] = 1
        positions[:, row, : lengths[row]] = torch.from_numpy(position_ids_of(checkpoint, sample))
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if structure.takes_positions:
        arguments["position_ids"] = positions if len(positions) > 1 else positions[0]
    for name, kind in structure.types.items():
        arguments[name] = kind * torch.eq(ids, checkpoint.model.image_token_id or -1).long()
    return _Batch(arguments, mask.reshape(-1).nonzero()[:, 0])


class _Streamed:
    """Gives the skeleton's modules their weights while they run."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        values: Activations | None,
        advance: Callable[[int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._values = values
        self._advance = advance
        self._done: set[str] = set()

    @contextmanager
    def __call__(self, layers: Sequence[str], tokens: torch.Tensor | None) -> Iterator[None]:
        """Let the model run: its parameters are there when they are used.

        layers: those that will run; their outputs are kept. tokens: rows of these that count.
        """
        every = [path for paths in self._checkpoint.structure.layers.values() for path in paths]
        inside = tuple(f"{layer}." for layer in every)
        hooks = [hook for layer in layers for hook in self._watch(layer, tokens)]
        own = []
        for name, parameter in self._model.named_parameters():
            if name.startswith(inside):
                continue
            module = self._model.get_submodule(name.rpartition(".")[0])
            large = 4 * parameter.numel() > _LARGE and isinstance(module, nn.Linear | nn.Embedding)
            if large:
                hooks += self._while_running(module, [name])
            else:
                own.append(name)
        fakes = self._load(own)
        try:
            yield
        finally:
            self._restore(fakes)
            for hook in hooks:
                hook.remove()

    def _while_running(self, module: nn.Module, names: Sequence[str]) -> list[Any]:
        """Hooks that load parameters before a module runs and let them go after."""
        fakes: dict[str, nn.Parameter] = {}

        def load(*ignored: Any) -> None:
            fakes.update(self._load(names))

        def drop(*ignored: Any) -> None:
            self._restore(fakes)

        return [module.register_forward_pre_hook(load), module.register_forward_hook(drop)]

    def _watch(self, path: str, tokens: torch.Tensor | None) -> list[Any]:
        layer = self._model.get_submodule(path)
        found: list[NDArray[np.float32]] = []
        names = [name for name, _ in layer.named_parameters(prefix=path)]

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._values is not None:
                hidden = output[0] if isinstance(output, tuple) else output
                rows = hidden.reshape(-1, hidden.shape[-1])
                found.append((rows if tokens is None else rows[tokens]).numpy())
                self._values.write(TORCH, path, np.concatenate(found))  # of several calls
            self._done.add(path)
            self._advance(len(self._done))

        hooks = self._while_running(layer, names)
        return [*hooks, layer.register_forward_hook(keep)]

    def _load(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """Set these parameters to the checkpoint's; returns what they were."""
        fakes = {name: self._model.get_parameter(name) for name in names}
        for name in names:
            value = self._checkpoint.tensor(name).to(torch.float32)
            self._set(name, nn.Parameter(value, requires_grad=False))
        self._checkpoint.release()
        return fakes

    def _restore(self, fakes: dict[str, nn.Parameter]) -> None:
        for name, fake in fakes.items():
            self._set(name, fake)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self._model.get_submodule(owner), attribute, parameter)
