"""A transformers module whose parameters have shapes but no storage, ready for tracing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.initialization import no_init_weights

from glmcompile.checkpoint import Checkpoint
from glmcompile.export.experts import EXPERTS

EAGER = "eager"


def build_skeleton(checkpoint: Checkpoint, mode: FakeTensorMode, attention: str) -> nn.Module:
    """The checkpoint's model in float32 with fake parameters and real buffers, in eval mode.

    attention: name of the attention function that all its layers call; EAGER for transformers' own.
    Buffers (rotary frequencies) are not in the checkpoint: the module computes them, so they are
    real. Tied parameters get a parameter of their own, so that each keeps its name in the graph.
    """
    config = copy.deepcopy(checkpoint.config)  # the attention functions are set on it below
    with _fake_parameters(mode), no_init_weights():
        model = checkpoint.model_class._from_config(config, dtype=torch.float32)
    for name in checkpoint.tied:
        owner, _, attribute = name.rpartition(".")
        tensor = model.get_parameter(name)
        with mode:
            separate = nn.Parameter(torch.empty_like(tensor), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, separate)
    set_attention(model, attention)
    return model.eval().requires_grad_(False)


def set_attention(model: nn.Module, attention: str) -> None:
    """Choose the attention function of every module, and the experts function that goes with it.

    On the configurations themselves: `set_attn_implementation` refuses names that contain "flash"
    unless the flash-attention package is installed.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, transformers.PreTrainedConfig):
            config._attn_implementation_internal = attention
            config._experts_implementation_internal = EAGER if attention == EAGER else EXPERTS


@contextmanager
def _fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    """Replace every parameter by a fake one at the moment a module registers it.

    The real one exists for that moment only, as address space never written to.
    """
    register = nn.Module.register_parameter

    def register_fake(self: nn.Module, name: str, param: nn.Parameter | None) -> Any:
        if param is not None and not isinstance(param, FakeTensor):
            with mode:
                data = torch.empty(param.shape, dtype=param.dtype)
            param = nn.Parameter(data, requires_grad=False)
        return register(self, name, param)

    nn.Module.register_parameter = register_fake  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
