"""transformers' processors, chosen so that they need no torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def image_processor(directory: Path, family: str) -> Any:
    """The PIL backend; the Auto classes would ask for torchvision."""
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    classes = {"glm4v": Glm4vImageProcessorPil, "qwen2_vl": Qwen2VLImageProcessorPil}
    return classes[family].from_pretrained(directory)


def tokenizer(directory: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(directory)


def processor(directory: Path, family: str) -> Any:
    """The whole processor, or the tokenizer of a text model; without the video processor."""
    import transformers
    from transformers.processing_utils import ProcessorMixin

    if family == "llama":
        return tokenizer(directory)
    classes = {"glm4v": transformers.Glm4vProcessor, "qwen2_vl": transformers.Qwen2VLProcessor}
    original = ProcessorMixin.check_argument_for_proper_class
    # Its argument check insists on a video processor, which exists for torchvision alone.
    ProcessorMixin.check_argument_for_proper_class = lambda *arguments: None
    try:
        return classes[family](
            image_processor(directory, family),
            tokenizer(directory),
            None,
            chat_template=(directory / "chat_template.jinja").read_text(),
        )
    finally:
        ProcessorMixin.check_argument_for_proper_class = original
