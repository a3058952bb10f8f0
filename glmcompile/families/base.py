"""What one model family declares: where its modules sit, its positions, its image placeholders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.config import ImageProcessorConfig, ModelConfig, VisionConfig
from glmcompile.errors import InputError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ModulePaths:
    """Where the components sit in the transformers model, as dotted attribute paths."""

    decoder: str
    embed_tokens: str
    lm_head: str = "lm_head"
    vision: str | None = None

    def layered(self, component: str) -> str | None:
        """The module that has a component's layers; None for the embedding, which has none."""
        return {"vision_encoder": self.vision, "decoder": self.decoder}.get(component)


@dataclass(frozen=True)
class Family:
    """A model family: data and pure functions, importable without torch or transformers.

    architectures: values of `architectures[0]` in config.json; each is a transformers class name.
    read_config: (config with defaults filled in, image processor's config, generation config)
        -> ModelConfig. The last two may be empty.
    positions: (token ids int64 [T], grid_thw int64 [images, 3], model)
        -> (position ids int64 [position_axes, T], position of the token after them).
    vision_inputs: (grid_thw int64 [images, 3], vision) -> every input of the vision encoder's graph
        but `pixel_values`.
    resize: (height, width, vision) -> (height, width) the image processor resizes to.
    image_placeholder: the text of one image token in a rendered prompt.
    """

    name: str
    architectures: tuple[str, ...]
    modules: ModulePaths
    read_config: Callable[[Config, Config, Config], ModelConfig]
    positions: Callable[
        [NDArray[np.int64], NDArray[np.int64], ModelConfig], tuple[NDArray[np.int64], int]
    ]
    vision_inputs: Callable[[NDArray[np.int64], VisionConfig], dict[str, NDArray[Any]]] | None = (
        None
    )
    resize: Callable[[int, int, VisionConfig], tuple[int, int]] | None = None
    image_placeholder: str | None = None

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the component graphs, in the order in which data flows through them."""
        vision = ("vision_encoder",) if self.modules.vision else ()
        return (*vision, "embedding", "decoder")

    def model_config(
        self, config: Config, processor: Config | None = None, generation: Config | None = None
    ) -> ModelConfig:
        """The runtime's description of a checkpoint.

        config: config.json with transformers' defaults filled in (`PreTrainedConfig.to_dict()`).
        processor: the image processor's settings; generation: generation_config.json.
        """
        return self.read_config(config, processor or {}, generation or {})

    def position_ids(
        self, token_ids: Sequence[int] | NDArray[np.int64], grid_thw: Any, model: ModelConfig
    ) -> tuple[NDArray[np.int64], int]:
        """Position ids int64 [position_axes, T] of a whole prompt and the next token's position.

        grid_thw: [images, 3] (frames, patch rows, patch columns), in the order of the prompt.
        Tokens generated after the prompt take next, next + 1, ... on every axis.
        Raises InputError when the image tokens do not match the grids.
        """
        grids = np.asarray(grid_thw, dtype=np.int64).reshape(-1, 3)
        return self.positions(np.asarray(token_ids, dtype=np.int64), grids, model)

    def image_tokens(
        self, grid_thw: Sequence[int] | NDArray[np.int64], vision: VisionConfig
    ) -> int:
        """How many decoder tokens an image of (frames, patch rows, patch columns) takes."""
        frames, rows, columns = (int(side) for side in grid_thw)
        return frames * rows * columns // vision.merge_size**2


def text_config(config: Config) -> Config:
    """The decoder's part of a configuration (nested in image models, flat in text models)."""
    nested = config.get("text_config")
    return nested if nested is not None else config


_DECODER_SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip


def decoder_fields(config: Config, generation: Config) -> dict[str, Any]:
    """The ModelConfig fields that every decoder shares, by their usual names in config.json.

    Raises ValueError for a size that is not positive.
    """
    text = text_config(config)
    for name in _DECODER_SIZES:
        if text[name] < 1:
            raise ValueError(f"{name} is {text[name]}, expected at least 1")
    heads = text["num_attention_heads"]
    return {
        "hidden_size": text["hidden_size"],
        "num_layers": text["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": text.get("num_key_value_heads") or heads,
        "head_size": text.get("head_dim") or text["hidden_size"] // heads,
        "vocab_size": text["vocab_size"],
        "context_length": text["max_position_embeddings"],
        "eos_token_ids": eos_token_ids(config, generation),
    }


def eos_token_ids(config: Config, generation: Config) -> tuple[int, ...]:
    """Tokens that end a generation: generation_config.json first, as `generate` reads them."""
    for source in (generation, config, text_config(config)):
        ids = source.get("eos_token_id")
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(int(id) for id in ids)
    return ()


def vision_config(
    vision: Config,
    processor: ImageProcessorConfig,
    *,
    width: int,
    output_size: int,
    position_grid: int | None = None,
) -> VisionConfig:
    """A vision encoder by the names its fields have in config.json's `vision_config`.

    width, output_size: channels inside and of an image feature, whose names differ by family.
    Raises ValueError for an image processor of other channels, or that can fit no image.
    """
    channels = vision["in_channels"]
    if not len(processor.mean) == len(processor.std) == channels:
        raise ValueError(f"image_mean and image_std need {channels} values, one a channel")
    if processor.min_pixels > processor.max_pixels:
        raise ValueError(
            f"min_pixels {processor.min_pixels} is above max_pixels {processor.max_pixels}"
        )
    return VisionConfig(
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        merge_size=vision["spatial_merge_size"],
        in_channels=channels,
        output_size=output_size,
        num_heads=vision["num_heads"],
        head_size=width // vision["num_heads"],
        position_grid=position_grid,
        processor=processor,
    )


def image_processor_config(
    processor: Config, defaults: ImageProcessorConfig
) -> ImageProcessorConfig:
    """Read preprocessor_config.json, of transformers 4 (min_pixels) or 5 (size.shortest_edge)."""
    size = processor.get("size") or {}
    fewest = processor.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    most = processor.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    return ImageProcessorConfig(
        min_pixels=int(fewest or defaults.min_pixels),
        max_pixels=int(most or defaults.max_pixels),
        mean=tuple(float(value) for value in processor.get("image_mean") or defaults.mean),
        std=tuple(float(value) for value in processor.get("image_std") or defaults.std),
        rescale_factor=processor.get("rescale_factor", defaults.rescale_factor),
        resample=processor.get("resample", defaults.resample),
    )


def text_positions(
    token_ids: NDArray[np.int64], grid_thw: NDArray[np.int64], model: ModelConfig
) -> tuple[NDArray[np.int64], int]:
    """One axis counting the tokens: the positions of a text-only decoder."""
    if len(grid_thw):
        raise InputError(f"{len(grid_thw)} images were given to a {model.family} model; text only")
    return np.arange(len(token_ids), dtype=np.int64)[None], len(token_ids)
