"""The three components as torch modules with the graph contract's inputs and outputs."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from glmcompile.config import ModelConfig
from glmcompile.export.attention import PagedCache
from glmcompile.families import Family
from glmcompile.families.bicubic import TAPS as POSITION_TAPS

# Sizes of the traced example. Distinct, and above 1, so that no dimension is taken for a constant
# or for another one.
PATCHES, TOKENS, IMAGE_TOKENS, SEQUENCES, ROWS = 48, 19, 12, 3, 5
NUM_BLOCKS, BLOCK_SIZE, MAX_BLOCKS = 7, 32, 4


@dataclass(frozen=True)
class Signature:
    """A component's graph interface.

    inputs: name -> (dtype, shape); a string in a shape is a dynamic dimension, an int is fixed.
    """

    inputs: dict[str, tuple[torch.dtype, tuple[int | str, ...]]]
    outputs: tuple[str, ...]


TRACED = {"patches", "segments_plus_1", "tokens", "image_tokens", "rows"}
EXAMPLE_SIZES = {
    "patches": PATCHES,
    "segments_plus_1": SEQUENCES + 1,
    "tokens": TOKENS,
    "image_tokens": IMAGE_TOKENS,
    "sequences": SEQUENCES,
    "sequences_plus_1": SEQUENCES + 1,
    "max_blocks": MAX_BLOCKS,
    "rows": ROWS,
    "num_blocks": NUM_BLOCKS,
    "block_size": BLOCK_SIZE,
}


def signature(family: Family, model: ModelConfig, component: str) -> Signature:
    """The graph contract of a component: input names, types and shapes, and output names."""
    hidden = model.hidden_size
    if component == "vision_encoder":
        assert model.vision is not None
        vision = model.vision
        inputs: dict[str, tuple[torch.dtype, tuple[int | str, ...]]] = {
            "pixel_values": (torch.float32, ("patches", vision.patch_values)),
            "cu_seqlens": (torch.int32, ("segments_plus_1",)),
            "position_ids": (torch.int64, ("patches", 2)),
        }
        if vision.position_grid is not None:
            inputs["position_cells"] = (torch.int64, ("patches", POSITION_TAPS))
            inputs["position_weights"] = (torch.float32, ("patches", POSITION_TAPS))
        return Signature(inputs, ("image_features",))
    if component == "embedding":
        inputs = {"input_ids": (torch.int64, ("tokens",))}
        if model.vision is not None:
            inputs["image_features"] = (torch.float32, ("image_tokens", hidden))
            inputs["image_token_indices"] = (torch.int64, ("image_tokens",))
        return Signature(inputs, ("inputs_embeds",))
    positions = ("tokens",) if model.position_axes == 1 else (model.position_axes, "tokens")
    inputs = {
        "inputs_embeds": (torch.float32, ("tokens", hidden)),
        "position_ids": (torch.int64, positions),
        "cumulative_sequence_length": (torch.int32, ("sequences_plus_1",)),
        "past_seqlens": (torch.int32, ("sequences",)),
        "block_table": (torch.int32, ("sequences", "max_blocks")),
        "logits_indices": (torch.int64, ("rows",)),
    }
    cache = ("num_blocks", "block_size", model.num_kv_heads, model.head_size)
    for layer in range(model.num_layers):
        inputs[f"key_cache.{layer}"] = (torch.float32, cache)
        inputs[f"value_cache.{layer}"] = (torch.float32, cache)
    return Signature(inputs, ("logits",))


def example_inputs(spec: Signature) -> tuple[torch.Tensor, ...]:
    """Tensors of the traced example's sizes; only shapes and types matter."""
    return tuple(
        torch.zeros([EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in shape], dtype=dtype)
        for dtype, shape in spec.inputs.values()
    )


def dynamic_shapes(spec: Signature) -> tuple[dict[int, Any], ...]:
    """torch.export's description of the dynamic dimensions, in the order of the inputs.

    Dimensions that nothing but the attention operator sees are traced as if fixed: two symbols
    for every cache would make tracing several times slower.
    """
    return tuple(
        {axis: Dim.DYNAMIC for axis, size in enumerate(shape) if size in TRACED}
        for _, shape in spec.inputs.values()
    )


class _Component(nn.Module, abc.ABC):
    """Takes the signature's inputs in order and hands them to `run` by name."""

    def __init__(self, model: nn.Module, family: Family, spec: Signature) -> None:
        super().__init__()
        self.model = model
        self.modules_at = family.modules
        self.names = tuple(spec.inputs)

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.run(**dict(zip(self.names, tensors, strict=True)))

    @abc.abstractmethod
    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The component's output from its inputs by name."""


class VisionEncoder(_Component):
    """pixel_values, cu_seqlens, position_ids[, position_cells, position_weights] -> image_features.

    The embeddings are handed cells and weights; grid_thw, which transformers finds them by, is not.
    """

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        assert self.modules_at.vision is not None
        visual = self.model.get_submodule(self.modules_at.vision)
        if "position_cells" in inputs:
            taps = inputs.pop("position_cells"), inputs.pop("position_weights")
            embeddings = visual.get_submodule("embeddings")
            embeddings.forward = partial(_add_positions, embeddings, taps)
        pixel_values = inputs.pop("pixel_values")
        # max_seqlen bounds a flash kernel's grid; the symbolic attention does not read it.
        return visual(pixel_values, grid_thw=None, max_seqlen=1, **inputs).pooler_output


def _add_positions(
    embeddings: nn.Module,
    taps: tuple[torch.Tensor, torch.Tensor],
    hidden_states: torch.Tensor,
    *places: Any,
) -> torch.Tensor:
    """Adds the position embedding resampled to the image's grid: its cells, weighed."""
    table = embeddings.get_parameter("position_embedding.weight")
    return hidden_states + torch.onnx.ops.symbolic(
        "com.glmcompile::EmbeddingBag",
        (table, *taps),
        dtype=hidden_states.dtype,
        shape=hidden_states.shape,
        version=1,
    )


class Embedding(_Component):
    """input_ids[, image_features, image_token_indices] -> inputs_embeds."""

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        embed_tokens = self.model.get_submodule(self.modules_at.embed_tokens)
        embeds = embed_tokens(inputs["input_ids"])
        if "image_features" in inputs:
            # index_put would come out as a ScatterND between transposes and expands.
            embeds = torch.onnx.ops.symbolic(
                "ScatterND",
                (embeds, inputs["image_token_indices"].unsqueeze(-1), inputs["image_features"]),
                dtype=embeds.dtype,
                shape=embeds.shape,
            )
        return embeds


class Decoder(_Component):
    """inputs_embeds, position_ids, the cache's inputs, logits_indices -> logits of those rows."""

    def run(self, **inputs: torch.Tensor) -> torch.Tensor:
        caches = [tensor for name, tensor in inputs.items() if "_cache." in name]
        hidden = self.model.get_submodule(self.modules_at.decoder)(
            inputs_embeds=inputs["inputs_embeds"].unsqueeze(0),
            position_ids=inputs["position_ids"].unsqueeze(-2),
            use_cache=False,
            paged_cache=PagedCache(
                key_caches=tuple(caches[0::2]),
                value_caches=tuple(caches[1::2]),
                cumulative_sequence_length=inputs["cumulative_sequence_length"],
                past_seqlens=inputs["past_seqlens"],
                block_table=inputs["block_table"],
            ),
        ).last_hidden_state
        lm_head = self.model.get_submodule(self.modules_at.lm_head)
        return lm_head(hidden.squeeze(0).index_select(0, inputs["logits_indices"]))


COMPONENTS: dict[str, type[_Component]] = {
    "vision_encoder": VisionEncoder,
    "embedding": Embedding,
    "decoder": Decoder,
}
