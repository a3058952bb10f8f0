"""What transformers computes: its modules, eager, in float32, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from glmcompile.checkpoint import Checkpoint
from glmcompile.compiler.activations import Activations
from glmcompile.compiler.calls import DECODER, EMBEDDING, OUTPUTS, TORCH, VISION
from glmcompile.compiler.samples import Sample, packed_images, position_ids_of
from glmcompile.export.repeat import layer_paths
from glmcompile.export.skeleton import build_skeleton


def component_layers(checkpoint: Checkpoint, component: str) -> list[str]:
    """The layers of a component, by their module paths; none in the embedding."""
    root = checkpoint.family.modules.layered(component)
    if root is None:
        return []
    with torch.device("meta"):
        return layer_paths(checkpoint.model_class._from_config(checkpoint.config), root)


def layer_count(checkpoint: Checkpoint) -> int:
    """How many layers `compute` runs."""
    return sum(len(component_layers(checkpoint, each)) for each in checkpoint.family.components)


@torch.inference_mode()
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
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    model = build_skeleton(checkpoint, mode, symbolic_attention=False)
    reference = _Streamed(checkpoint, model, values if layers else None, advance)
    modules = checkpoint.family.modules
    features = None
    if modules.vision is not None and any(each.images for each in samples):
        pixels, grids = packed_images(samples)
        with reference.streamed(modules.vision) as visual:
            output = visual(torch.from_numpy(pixels), grid_thw=torch.from_numpy(grids))
        features = output.pooler_output.float()
        values.write(TORCH, OUTPUTS[VISION], features.numpy())

    ids = torch.from_numpy(np.concatenate([each.token_ids for each in samples]))
    with reference.streamed(modules.embed_tokens) as embed_tokens:
        embeds = embed_tokens(ids)
    if features is not None:
        is_image = torch.eq(ids, checkpoint.model.image_token_id or -1)
        embeds = embeds.masked_scatter(is_image[:, None], features)
    values.write(TORCH, OUTPUTS[EMBEDDING], embeds.numpy())

    positions = [position_ids_of(checkpoint, each) for each in samples]
    position_ids = torch.from_numpy(np.concatenate(positions, axis=1))
    with reference.streamed(modules.decoder, without=modules.embed_tokens) as decoder:
        hidden = decoder(
            inputs_embeds=embeds[None],
            attention_mask=_own_past([len(each.token_ids) for each in samples]),
            position_ids=position_ids if len(position_ids) == 1 else position_ids[:, None],
            use_cache=False,
        ).last_hidden_state
    with reference.streamed(modules.lm_head) as lm_head:
        wanted = hidden[0] if rows is None else hidden[0][torch.from_numpy(rows)]
        values.write(TORCH, OUTPUTS[DECODER], lm_head(wanted).numpy())


def _own_past(lengths: Sequence[int]) -> torch.Tensor:
    """An additive mask [1, 1, T, T] under which a token sees those before it in its sequence."""
    total = sum(lengths)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (sequence[:, None] == sequence).tril()
    mask = torch.full((total, total), torch.finfo(torch.float32).min)
    return mask.masked_fill(seen, 0.0)[None, None]


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
        self._done = 0

    @contextmanager
    def streamed(self, path: str, without: str = "") -> Iterator[nn.Module]:
        """The module at `path`: what is outside its layers loaded, its layers when they run.

        without: path of a part of it that is not called and stays without weights.
        """
        layers = layer_paths(self._model, path)
        inside = tuple(f"{layer}." for layer in layers) + ((f"{without}.",) if without else ())
        root = self._model.get_submodule(path)
        own = [
            name for name, _ in root.named_parameters(prefix=path) if not name.startswith(inside)
        ]
        hooks = [hook for layer in layers for hook in self._watch(layer)]
        fakes = self._load(own)
        try:
            yield root
        finally:
            self._restore(fakes)
            for hook in hooks:
                hook.remove()

    def _watch(self, path: str) -> list[Any]:
        layer = self._model.get_submodule(path)
        names = [name for name, _ in layer.named_parameters(prefix=path)]
        fakes: dict[str, nn.Parameter] = {}

        def load(*ignored: Any) -> None:
            fakes.update(self._load(names))

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._restore(fakes)
            if self._values is not None:
                hidden = output[0] if isinstance(output, tuple) else output
                self._values.write(TORCH, path, hidden.reshape(-1, hidden.shape[-1]).numpy())
            self._done += 1
            self._advance(self._done)

        return [layer.register_forward_pre_hook(load), layer.register_forward_hook(keep)]

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
