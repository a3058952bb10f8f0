"""Tokenizers, processors and chat templates of tiny checkpoints."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin

from benchmarks.architectures.configs import special_tokens
from benchmarks.architectures.inputs import IMAGES, PLACEHOLDERS, PROCESSORS, TOKENIZERS
from benchmarks.architectures.tokens import UNNAMED, texts

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}IMAGE
{%- elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Types that the auto mappings leave out.
PROCESSOR_NAMES = PROCESSOR_MAPPING_NAMES | {
    "cosmos3_omni": "Qwen3VLProcessor",
    "glm_ocr": "Glm46VProcessor",
    "glmga": "Glm46VProcessor",
    "fast_vlm": "LlavaProcessor",
    "kosmos-2": "Kosmos2Processor",
    "kosmos-2.5": "Kosmos2_5Processor",
    "qwen2_5_omni_thinker": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe_thinker": "Qwen3OmniMoeProcessor",
    "vision-encoder-decoder": "TrOCRProcessor",
}
IMAGE_PROCESSOR_NAMES = {
    "qwen3_vl_moe": "Qwen2VLImageProcessor",
    "glm4v_moe": "Glm4vImageProcessor",
    "glm_ocr": "Glm46VImageProcessor",
    "diffusion_gemma": "Gemma4ImageProcessor",
    "fast_vlm": "CLIPImageProcessor",
    "instructblipvideo": "BlipImageProcessor",
    "mistral3": "PixtralImageProcessor",
    "qwen2_5_omni_thinker": "Qwen2VLImageProcessor",
    "qwen3_omni_moe_thinker": "Qwen2VLImageProcessor",
    "vision-encoder-decoder": "ViTImageProcessor",
}
PILLOW = {backends.get("pil") for backends in IMAGE_PROCESSOR_MAPPING_NAMES.values()}


def image_processor_name(model_type: str) -> str | None:
    """The name that checkpoints carry; the Pillow class's has "Pil" after it."""
    backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    return (
        IMAGE_PROCESSOR_NAMES.get(model_type) or backends.get("torchvision") or backends.get("pil")
    )


def write_processor(model_type: str, config: Any, directory: Path) -> None:
    """The tokenizer, and for image types the processor's files and the chat template."""
    tokenizer = make_tokenizer(model_type)
    tokenizer.save_pretrained(directory)
    if hasattr(config, "qformer_config") and "instruct" in model_type:
        tokenizer.save_pretrained(directory / "qformer_tokenizer")
    (directory / "chat_template.jinja").write_text(chat_template(model_type))
    if name := image_processor_name(model_type):
        settings = image_settings(model_type, name, config)
        settings["processor_class"] = PROCESSOR_NAMES[model_type]
        write_json(directory / "preprocessor_config.json", settings)
        write_json(directory / "processor_config.json", processor_settings(model_type, config))


def write_json(path: Path, settings: dict) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n")


def make_tokenizer(model_type: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token per UTF-8 byte, then the special tokens."""
    tokens = special_tokens(model_type)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    bytes_only = tokenizers.Tokenizer(model)
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = tokenizers.decoders.ByteLevel()
    bytes_only.add_special_tokens(texts(tokens))
    standard = {"eos", "pad", "bos", "unk", "sep", "cls", "mask"} & tokens.keys()
    named = {
        f"{role}_token": text
        for role, text in tokens.items()
        if isinstance(text, str) and role not in standard
    }
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        clean_up_tokenization_spaces=False,
        **{f"{role}_token": tokens[role] for role in standard},
        extra_special_tokens=list(named.values()) if model_type in UNNAMED else named,
        **TOKENIZERS.get(model_type, {}),
    )


def chat_template(model_type: str) -> str:
    tokens = special_tokens(model_type)
    placeholder = PLACEHOLDERS.get(model_type, "{image}") if "image" in tokens else ""
    return TEMPLATE.replace("IMAGE", placeholder.format(**tokens))


def processor_settings(model_type: str, config: Any) -> dict[str, Any]:
    """What the Processor itself is made with: fields that the config has too, then the table."""
    name = PROCESSOR_NAMES[model_type]
    settings = {"processor_class": name}
    for parameter in inspect.signature(getattr(transformers, name)).parameters:
        source = getattr(config, "vision_config", None) if parameter == "patch_size" else config
        if isinstance(value := getattr(source, parameter, None), (int, str)):
            settings[parameter] = value
    return settings | PROCESSORS.get(model_type, {})


def image_settings(model_type: str, name: str, config: Any) -> dict[str, Any]:
    """The image processor's published settings, at the sizes of the tiny vision config."""
    kind = pillow_class(name)
    settings = fitted(kind().to_dict() if kind else {}, config)
    settings |= IMAGES.get(model_type, {})
    settings = kind(**settings).to_dict() if kind else settings
    return {**settings, "image_processor_type": name}


def pillow_class(name: str) -> type | None:
    """The image processor that needs neither torch nor torchvision, or None."""
    for candidate in (f"{name}Pil", name):
        if candidate in PILLOW:
            return getattr(transformers, candidate)
    return None


def image_class(name: str) -> type:
    """The Pillow class, or the one on torchvision."""
    return pillow_class(name) or getattr(transformers, name)


def fitted(settings: dict[str, Any], config: Any) -> dict[str, Any]:
    """Sizes that follow from the vision config: patches, merging, square images and tiles."""
    owner = getattr(config, "encoder", config)
    vision = getattr(owner, "vision_config", None) or owner
    patch, side = (first(getattr(vision, name, None)) for name in ("patch_size", "image_size"))
    size, changed = settings.get("size") or {}, {}
    if "image_grid_pinpoints" in settings:
        changed["image_grid_pinpoints"] = config.image_grid_pinpoints
    for name, value in (
        ("patch_size", patch),
        ("merge_size", getattr(vision, "spatial_merge_size", None)),
        ("temporal_patch_size", getattr(vision, "temporal_patch_size", None)),
        ("tile_size", side),
    ):
        if isinstance(settings.get(name), int) and value:
            changed[name] = value
    if set(size) == {"shortest_edge", "longest_edge"} and "merge_size" in settings and patch:
        block = patch * changed.get("merge_size", settings["merge_size"])  # sizes are areas
        changed["size"] = {"shortest_edge": 2 * block * 2 * block, "longest_edge": 64 * block**2}
    elif side:
        if set(size) == {"height", "width"}:
            changed["size"] = {"height": side, "width": side}
        elif set(size) == {"shortest_edge"}:
            changed["size"] = {"shortest_edge": side}
        if settings.get("crop_size"):
            changed["crop_size"] = {"height": side, "width": side}
    return settings | changed


def first(value: Any) -> int | None:
    return value[0] if isinstance(value, (list, tuple)) else value


class Absent:
    """In place of a video processor, which would need torchvision, or an audio one."""

    model_input_names: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def to_dict(self) -> dict[str, Any]:
        return {}


def load_processor(directory: Path) -> ProcessorMixin:
    """The checkpoint's own Processor on Pillow, whether or not its video half could be made."""
    directory = Path(directory)
    try:
        return transformers.AutoProcessor.from_pretrained(directory, backend="pil")
    except (ImportError, OSError, ValueError, TypeError):
        settings = json.loads((directory / "processor_config.json").read_text())
        images = json.loads((directory / "preprocessor_config.json").read_text())
        kind = getattr(transformers, settings.pop("processor_class"))
        parts = {
            "tokenizer": transformers.AutoTokenizer.from_pretrained(directory),
            "image_processor": image_class(images["image_processor_type"])(**images),
            "qformer_tokenizer": None,
        }
        check = ProcessorMixin.check_argument_for_proper_class
        ProcessorMixin.check_argument_for_proper_class = lambda *_: None
        try:
            attributes = {name: parts.get(name, Absent()) for name in kind.get_attributes()}
            template = (directory / "chat_template.jinja").read_text()
            return kind(**attributes, chat_template=template, **settings)
        finally:
            ProcessorMixin.check_argument_for_proper_class = check
