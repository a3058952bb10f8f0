"""A GGUF file's metadata as the files of a checkpoint directory, written by transformers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.integrations.gguf import read_gguf_metadata
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from glmcompile.checkpoint.gguf.tensors import tensors_of
from glmcompile.checkpoint.sources import WeightFiles
from glmcompile.errors import CheckpointError, UnsupportedArchitectureError

# Meta's settings of Llama 3.1 and later, which the factors in a file are computed with.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def architecture_of(file: Path) -> str:
    """The file's own word for its architecture. Raises CheckpointError for a damaged file."""
    return _metadata(file)[0]["general.architecture"]


def write_directory(file: Path) -> tempfile.TemporaryDirectory[str]:
    """A directory with config.json, generation_config.json, tokenizer and chat template.

    Raises CheckpointError for files that are damaged, split, or hold no language model, and
    UnsupportedArchitectureError for those that transformers cannot read.
    """
    metadata, names = _metadata(file)
    architecture = metadata["general.architecture"]
    if metadata.get("split.count", 0) > 1:
        raise CheckpointError(
            f"{file} is one of {metadata['split.count']} parts; join them with llama.cpp's "
            "`llama-gguf-split --merge` and give the result"
        )
    if metadata.get("general.type", "model") != "model" or architecture == "clip":
        raise CheckpointError(
            f"{file} holds no language model ({metadata.get('general.type', architecture)}); an "
            "image model or an adapter must be given as Hugging Face publishes it, in safetensors"
        )
    tensors_of(file)  # is whole
    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(file.parent, **place)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **place)
    except Exception as error:  # transformers raises many kinds for what it does not know
        raise UnsupportedArchitectureError(
            f"{file}: transformers reads no {architecture} model from this GGUF file "
            f"({' '.join(str(error).split())}); give the checkpoint in safetensors"
        ) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedArchitectureError(f"{file}: {config.model_type} generates no text")
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    _scale_rotary(config, file, metadata, names)
    if inner := metadata.get(f"{architecture}.expert_feed_forward_length"):
        config.get_text_config().moe_intermediate_size = inner  # not read by transformers
    directory = tempfile.TemporaryDirectory(prefix="glmcompile-gguf-")
    config.save_pretrained(directory.name)
    tokenizer.save_pretrained(directory.name)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: getattr(config, name, None) for name in tokens}
    Path(directory.name, "generation_config.json").write_text(json.dumps(generation))
    return directory


def _metadata(file: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        return read_gguf_metadata(str(file))
    except Exception as error:  # whatever comes of reading bytes that are none of its own
        raise CheckpointError(
            f"{file} is not a whole GGUF file ({' '.join(str(error).split())}); fetch it again"
        ) from error


def _scale_rotary(
    config: PreTrainedConfig, file: Path, metadata: dict[str, Any], names: tuple[str, ...]
) -> None:
    """Set how rotary frequencies are scaled, which transformers' reader leaves out.

    Raises CheckpointError for scalings that the metadata does not describe.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return
    architecture = metadata["general.architecture"]
    scaling = {
        name: metadata.get(f"{architecture}.rope.scaling.{name}")
        for name in ("type", "factor", "original_context_length")
    }
    if "rope_freqs.weight" in names:
        text.rope_parameters = _llama3(text, file)
    elif scaling["type"] in ("linear", "yarn"):
        text.rope_parameters = {**rope, "rope_type": scaling["type"], "factor": scaling["factor"]}
        if scaling["original_context_length"]:
            original = scaling["original_context_length"]
            text.rope_parameters["original_max_position_embeddings"] = original
    elif scaling["type"] not in (None, "none") or "rope_factors_long.weight" in names:
        raise CheckpointError(
            f"{file} scales its rotary frequencies in a way ({scaling['type'] or 'longrope'}) that "
            "cannot be read from a GGUF file; give the checkpoint in safetensors"
        )


def _llama3(text: PreTrainedConfig, file: Path) -> dict[str, Any]:
    """Llama 3's scaling, found by the divisor of each frequency that the file holds."""
    divisors = tensors_of(file)["rope_freqs.weight"].read(WeightFiles())
    theta, size = text.rope_parameters["rope_theta"], 2 * len(divisors)
    plain = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    found = {"rope_theta": theta, "rope_type": "llama3", "factor": divisors.max().item(), **LLAMA3}
    text.rope_parameters = found
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, "cpu")
    if scaled.shape != plain.shape or not torch.allclose(scaled, plain / divisors, rtol=1e-3):
        raise CheckpointError(
            f"{file}: rope_freqs.weight scales the rotary frequencies otherwise than Llama 3 does; "
            "give the checkpoint in safetensors, whose config.json says how"
        )
    return found
