"""Tiny random checkpoints: config, safetensors, tokenizer, processor, template.

Deterministic, and made in well under a second. Weights are scaled so that every layer matters:
activations stay near unit size, so a wrong position, mask or weight shows in the output.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import tokenizers
import torch
import transformers

VOCAB_SIZE = 288  # 256 bytes, then the special tokens, then rows no text produces

SPECIAL_TOKENS = {
    "glm4v": (
        "<|endoftext|>",
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|video|>",
    ),
    "qwen2_vl": (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    "llama": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}

GLM4V_TEMPLATE = """[gMASK]<sop>
{%- for message in messages %}
{%- if message.role == 'user' %}<|user|>
{% if message.content is string %}{{ message.content }}
{%- else %}{% for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}<|begin_of_image|><|image|><|end_of_image|>
{%- elif part.type == 'text' %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{%- elif message.role == 'assistant' %}<|assistant|>
{{ message.content }}
{%- elif message.role == 'system' %}<|system|>
{{ message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""

CHATML_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEMPLATES = {"glm4v": GLM4V_TEMPLATE, "qwen2_vl": CHATML_TEMPLATE, "llama": CHATML_TEMPLATE}


def token_id(family: str, token: str) -> int:
    """The id of a special token of a tiny checkpoint."""
    return 256 + SPECIAL_TOKENS[family].index(token)


def glm4v_config(tied: bool = False) -> transformers.Glm4vConfig:
    family = "glm4v"
    return transformers.Glm4vConfig(
        architectures=["Glm4vForConditionalGeneration"],
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "eos_token_id": [
                token_id(family, name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")
            ],
            "pad_token_id": token_id(family, "<|endoftext|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 0.5,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "image_size": 84,
            "out_hidden_size": 128,
            "intermediate_size": 192,
        },
        image_token_id=token_id(family, "<|image|>"),
        video_token_id=token_id(family, "<|video|>"),
        image_start_token_id=token_id(family, "<|begin_of_image|>"),
        image_end_token_id=token_id(family, "<|end_of_image|>"),
        video_start_token_id=token_id(family, "<|begin_of_video|>"),
        video_end_token_id=token_id(family, "<|end_of_video|>"),
        tie_word_embeddings=tied,
    )


def qwen2_vl_config(tied: bool = True) -> transformers.Qwen2VLConfig:
    family = "qwen2_vl"
    return transformers.Qwen2VLConfig(
        architectures=["Qwen2VLForConditionalGeneration"],
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": token_id(family, "<|endoftext|>"),
            "eos_token_id": token_id(family, "<|im_end|>"),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "num_heads": 4,
            "mlp_ratio": 2,
        },
        image_token_id=token_id(family, "<|image_pad|>"),
        video_token_id=token_id(family, "<|video_pad|>"),
        vision_start_token_id=token_id(family, "<|vision_start|>"),
        vision_end_token_id=token_id(family, "<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def llama_config(tied: bool = True) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        bos_token_id=token_id("llama", "<|im_start|>"),
        eos_token_id=token_id("llama", "<|im_end|>"),
        tie_word_embeddings=tied,
    )


CONFIGS = {"glm4v": glm4v_config, "qwen2_vl": qwen2_vl_config, "llama": llama_config}


def write_checkpoint(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "1GB",
    tied: bool | None = None,
    layers: int = 2,
) -> Path:
    """Write a tiny checkpoint. family: a name in CONFIGS.

    layers: of the decoder, and of the vision encoder.
    """
    config = CONFIGS[family]() if tied is None else CONFIGS[family](tied)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1] * layers
    if hasattr(config, "vision_config"):
        config.vision_config.depth = layers
    model = getattr(transformers, config.architectures[0])._from_config(config)
    fill_weights(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer(family).save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATES[family])
    if family != "llama":
        write_processor(family, directory)
    return directory


def text_config(name: str, **fields: object) -> transformers.PreTrainedConfig:
    """A text model's configuration of two layers of 4 heads. name: of transformers' classes."""
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **fields,
        }
    )
    config.architectures = [f"{name}ForCausalLM"]
    return config


def write_text_checkpoint(config: transformers.PreTrainedConfig, directory: Path) -> Path:
    """Write a checkpoint of any text model, with the tokenizer of the tiny Llama."""
    model = getattr(transformers, config.architectures[0])._from_config(config)
    fill_weights(model)
    model.save_pretrained(directory)
    tokenizer("llama").save_pretrained(directory)
    return directory


def fill_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights that keep activations near unit size: N(0, 1/fan_in), norms near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            fan_in = 1 if "embed" in name and "patch" not in name else parameter[0].numel()
            value = noise / math.sqrt(fan_in)
        elif name.endswith("weight"):
            value = 1 + 0.1 * noise
        else:
            value = 0.1 * noise
        parameter.data.copy_(value)


def tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token per UTF-8 byte, then the special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    bytes_only = tokenizers.Tokenizer(model)
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = tokenizers.decoders.ByteLevel()
    bytes_only.add_special_tokens(list(SPECIAL_TOKENS[family]))
    eos = "<|endoftext|>" if family == "glm4v" else "<|im_end|>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        eos_token=eos,
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def write_processor(family: str, directory: Path) -> None:
    """preprocessor_config.json with pixel bounds that make images of a few dozen patches."""
    name = {"glm4v": "Glm4v", "qwen2_vl": "Qwen2VL"}[family]
    settings = {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
