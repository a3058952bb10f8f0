"""What the runtime must know of a model: shapes and tokens, stored in the manifest as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ImageProcessorConfig:
    """How an image becomes patches (the fields of Hugging Face's `preprocessor_config.json`).

    min_pixels, max_pixels: bounds on height * width after resizing.
    resample: Pillow's filter number (3 is bicubic).
    mean, std: per channel, applied after multiplying the bytes by rescale_factor.
    """

    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 3


@dataclass(frozen=True)
class VisionConfig:
    """Geometry of the vision encoder.

    output_size: width of an image feature, equal to the decoder's hidden size.
    position_grid: side of the learned position-embedding grid; None where only rotary is used.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    in_channels: int
    output_size: int
    num_heads: int
    head_size: int
    position_grid: int | None
    processor: ImageProcessorConfig

    @property
    def patch_values(self) -> int:
        """Values of one patch: channels, frames, rows and columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def width(self) -> int:
        """Channels inside the encoder."""
        return self.num_heads * self.head_size


@dataclass(frozen=True)
class ModelConfig:
    """Geometry and special tokens of the whole model.

    position_axes: 1, or 3 for M-RoPE (temporal, height, width).
    vision, image_token_id: None for a text-only model.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    position_axes: int = 1
    image_token_id: int | None = None
    vision: VisionConfig | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        fields = dict(data, eos_token_ids=tuple(data["eos_token_ids"]))
        if data["vision"] is not None:
            processor = dict(data["vision"]["processor"])
            processor |= {key: tuple(processor[key]) for key in ("mean", "std")}
            fields["vision"] = VisionConfig(
                **dict(data["vision"], processor=ImageProcessorConfig(**processor))
            )
        return cls(**fields)
