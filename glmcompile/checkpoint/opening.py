"""Opens and validates a checkpoint in any of the forms it may be published in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from glmcompile.checkpoint.adapter import open_adapter
from glmcompile.checkpoint.conversions import Conversion, complete, parameters_of
from glmcompile.checkpoint.json_files import read_json
from glmcompile.checkpoint.opened import Checkpoint
from glmcompile.checkpoint.quantized import dequantized, method_of
from glmcompile.checkpoint.safetensors_files import INDEX_FILE, SINGLE_FILE, stored_tensors
from glmcompile.checkpoint.sources import Source
from glmcompile.errors import CheckpointError, UnsupportedArchitectureError

GGUF_SUFFIX = ".gguf"


def open_checkpoint(path: str | Path, adapter: str | Path | None = None) -> Checkpoint:
    """Open a directory as `save_pretrained` writes it, or a GGUF file; never touches the network.

    Weights may be in a layout that transformers converts, or quantized; `Checkpoint.notes` says so.
    adapter: directory of a LoRA adapter as PEFT writes it, which is merged.
    Raises CheckpointError for anything missing, damaged or unsafe, and
    UnsupportedArchitectureError for an architecture that cannot be compiled.
    """
    path = Path(path)
    gguf = _gguf_file(path)
    if gguf is None and not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory; give the local directory of a Hugging Face "
            "checkpoint (config.json, model.safetensors, tokenizer.json), or a GGUF file"
        )
    held = _gguf().write_directory(gguf) if gguf is not None else None
    directory = Path(held.name) if held is not None else path
    lora = open_adapter(Path(adapter)) if adapter is not None else None

    config_json = read_json(directory / "config.json")
    architecture = _architecture(config_json)
    if (quantization := _quantization(config_json)) is not None:
        method_of(quantization, path)  # refused before anything else is read
    read_json(directory / "tokenizer.json")
    config = _load_config(directory, architecture)

    with torch.device("meta"):
        network = getattr(transformers, architecture)._from_config(config)
    conversion = Conversion(network)
    stored: dict[str, Source] = {}
    notes: list[str] = []
    if gguf is not None:
        parameters, notes = _gguf().parameters(gguf, network)
    else:
        stored |= stored_tensors(directory)
        if quantization is not None:
            stored, notes = dequantized(stored, quantization, directory)
        adapted = lora.merged_into_stored(stored, conversion) if lora is not None else stored
        parameters = parameters_of(adapted, conversion)
    parameters, tied = complete(parameters, conversion, path)
    if lora is not None:
        parameters, tied = lora.merged(parameters, tied, conversion, stored)
        notes += lora.notes(directory)
    checkpoint = Checkpoint(
        path,
        directory,
        architecture,
        config,
        parameters,
        tied,
        described_by=[
            *([directory / "config.json"] if gguf is None else [gguf]),
            *(lora.files if lora is not None else ()),
        ],
        notes=notes,
        held=held,
    )
    _ = checkpoint.model  # what cannot be compiled is refused before weights are read
    return checkpoint


def _architecture(config_json: Mapping[str, Any]) -> str:
    """The transformers class that a configuration names.

    Raises UnsupportedArchitectureError for one that generates no text.
    """
    architectures = config_json.get("architectures")
    if not isinstance(architectures, list | tuple) or not architectures:
        raise UnsupportedArchitectureError(
            "config.json names no architecture; expected `architectures` to hold the name of a "
            "transformers class, such as LlamaForCausalLM"
        )
    name = str(architectures[0])
    known = {
        each
        for mapping in (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        )
        for each in mapping.values()
    }
    if name not in known or not hasattr(transformers, name):
        raise UnsupportedArchitectureError(
            f"architecture {name} is not supported: transformers {transformers.__version__} has no "
            "model of that name that generates text, or text from images"
        )
    return name


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path means; None for a directory with safetensors, or nothing there.

    Raises CheckpointError for one that is missing, and for a directory with several.
    """
    if path.suffix == GGUF_SUFFIX and not path.is_dir():
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; give the path of a GGUF file")
        return path
    if not path.is_dir() or (path / INDEX_FILE).is_file() or (path / SINGLE_FILE).is_file():
        return None
    found = sorted(path.glob(f"*{GGUF_SUFFIX}"))
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds {len(found)} GGUF files ({', '.join(file.name for file in found)}); "
            "give the path of one of them"
        )
    return found[0] if found else None


def _gguf() -> ModuleType:
    """The modules that read GGUF files, for which a package more is needed."""
    try:
        from glmcompile.checkpoint import gguf
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"GGUF files are read with the package {error.name}; `pip install gguf`"
        ) from error
    return gguf


def _quantization(config_json: Mapping[str, Any]) -> Any:
    """How config.json says that the weights are quantized; None for plain ones."""
    parts = (config_json, config_json.get("text_config"))
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        # compressed-tensors' first releases wrote the other name
        settings = part.get("quantization_config") or part.get("compression_config")
        if settings:
            return settings
    return None


def _load_config(directory: Path, architecture: str) -> transformers.PreTrainedConfig:
    try:
        config_class = getattr(transformers, architecture).config_class
        config = config_class.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a bad field
        raise CheckpointError(
            f"{directory / 'config.json'} does not describe a {architecture}: "
            f"{' '.join(str(error).split())}; fetch it again"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the parameters are dequantized
    return config
