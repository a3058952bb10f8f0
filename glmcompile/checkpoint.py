"""Open and validate a local Hugging Face checkpoint; weights are mapped and read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from glmcompile.errors import CheckpointError, UnsupportedArchitectureError

if TYPE_CHECKING:
    from glmcompile.contract import Contract
    from glmcompile.export.components import Structure

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ROWS_BYTES = 16 << 20  # how much of a tensor is converted to float32 at a time


@dataclass(frozen=True)
class StoredTensor:
    """A weight where it lies: shard, name there, type and shape. Nothing is read yet."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """A validated checkpoint directory. Made by `open_checkpoint`.

    architecture: name of the transformers class; config: its configuration, defaults filled in.
    parameters: parameter name in the transformers module -> where its value is stored. A tied
        parameter (lm_head sharing the embedding) has no entry of its own; see `tied`.
    tied: name of each tied parameter -> name of the parameter it shares.
    """

    def __init__(
        self,
        path: Path,
        architecture: str,
        config: transformers.PreTrainedConfig,
        parameters: dict[str, StoredTensor],
        tied: dict[str, str],
    ) -> None:
        self.path = path
        self.architecture = architecture
        self.config = config
        self.parameters = parameters
        self.tied = tied
        self._open_files: dict[Path, Any] = {}

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        """transformers' class for the checkpoint's architecture."""
        return getattr(transformers, self.architecture)

    @cached_property
    def _discovered(self) -> tuple[Contract, Structure]:
        from glmcompile.discover import discover

        return discover(self)

    @property
    def model(self) -> Contract:
        """What the compiled model will take and give."""
        return self._discovered[0]

    @property
    def structure(self) -> Structure:
        """Where layers, embedding and output layer sit in the transformers model."""
        return self._discovered[1]

    @cached_property
    def generation(self) -> dict[str, Any]:
        """generation_config.json; empty without one."""
        return _read_json(self.path / "generation_config.json", optional=True)

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter as stored (bfloat16, float16 or float32); its pages are read when used."""
        stored = self.parameters[self.tied.get(name, name)]
        return self._file(stored.file).get_tensor(stored.key)

    def float32_rows(self, name: str) -> Iterator[torch.Tensor]:
        """A parameter as float32 blocks of whole rows of about 16 MB, so a copy never adds up."""
        tensor = self.tensor(name)
        if tensor.ndim == 0:
            yield tensor.float()
            return
        rows = max(1, ROWS_BYTES // max(1, tensor[:1].numel() * 4))
        for block in tensor.split(rows):
            yield block.to(torch.float32)

    def release(self) -> None:
        """Unmap the weight files, whose pages that were read count as this process's memory.

        Tensors that are still held stay valid; the next one read maps its file again.
        """
        self._open_files.clear()

    def _file(self, path: Path) -> Any:
        if path not in self._open_files:
            self._open_files[path] = safetensors.safe_open(path, framework="pt")
        return self._open_files[path]

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja chat template: chat_template.jinja, else the tokenizer's; None without one."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = _read_json(self.path / name, optional=True).get("chat_template")
            if isinstance(template, list):  # several named templates: generation uses "default"
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
            if template is not None:
                return template
        return None

    @cached_property
    def sampling(self) -> dict[str, float]:
        """What generation_config.json says of how answers are sampled, by SamplingParams' names.

        Its author's word that nothing is drawn (`do_sample` is false) is a temperature of 0.
        """
        settings = self.generation
        if settings.get("do_sample") is False:
            return {"temperature": 0.0}
        return {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if isinstance(value := settings.get(name), int | float)
        }

    @property
    def files(self) -> list[Path]:
        """config.json and the weight files, in the order in which they are hashed."""
        shards = sorted({stored.file for stored in self.parameters.values()})
        return [self.path / "config.json", *shards]

    def hash(self, advance: Callable[[int], None] = lambda done: None) -> str:
        """SHA-256 over config.json and the weight files' names and bytes, as hexadecimal.

        advance: told how many bytes are done.
        """
        digest = hashlib.sha256()
        done = 0
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
                    done += len(block)
                    advance(done)
        return digest.hexdigest()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a directory as `save_pretrained` writes it; never touches the network.

    Raises CheckpointError for anything missing, damaged or unsafe, and
    UnsupportedArchitectureError when no family covers its architecture.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; give the local directory of a Hugging Face "
            "checkpoint (config.json, model.safetensors, tokenizer.json)"
        )
    config_json = _read_json(directory / "config.json")
    architecture = _architecture(config_json)
    if config_json.get("quantization_config"):
        settings = config_json["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise CheckpointError(
            f"{directory} holds weights already quantized ({method}); "
            "give the original checkpoint in bfloat16, float16 or float32"
        )
    _read_json(directory / "tokenizer.json")
    config = _load_config(directory, architecture)
    parameters, tied = _locate_parameters(directory, architecture, config)
    checkpoint = Checkpoint(directory, architecture, config, parameters, tied)
    _ = checkpoint.model  # what cannot be compiled is refused before weights are read
    return checkpoint


def _architecture(config_json: dict[str, Any]) -> str:
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


def _read_json(file: Path, optional: bool = False) -> dict[str, Any]:
    if not file.is_file():
        if optional:
            return {}
        raise CheckpointError(
            f"{file} is missing; a checkpoint directory needs it (was the download complete?)"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds a {type(data).__name__}; expected a JSON object")
    return data


def _load_config(directory: Path, architecture: str) -> transformers.PreTrainedConfig:
    try:
        config_class = getattr(transformers, architecture).config_class
        config = config_class.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a bad field
        raise CheckpointError(
            f"{directory / 'config.json'} does not describe a {architecture}: "
            f"{' '.join(str(error).split())}; fetch it again"
        ) from error
    return config


def _stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the weight files by its name there, from the files' headers."""
    index = directory / INDEX_FILE
    if index.is_file():
        shards = _shards_of_index(index)
    elif (directory / SINGLE_FILE).is_file():
        shards = {SINGLE_FILE: []}
    else:
        pickled = sorted(f.name for f in directory.iterdir() if f.suffix in PICKLE_SUFFIXES)
        if pickled:
            raise CheckpointError(
                f"{directory} has only pickled weights ({', '.join(pickled)}), which are refused: "
                "loading a pickle can run any code in it. Convert a checkpoint that you trust with "
                "transformers' `save_pretrained`, which writes safetensors, and give that directory"
            )
        raise CheckpointError(f"{directory} has no weights: expected {SINGLE_FILE} or {INDEX_FILE}")
    tensors: dict[str, StoredTensor] = {}
    for shard, expected in shards.items():
        found = _tensors_of_file(directory / shard)
        for key in expected:
            if key not in found:
                raise CheckpointError(
                    f"{directory / shard} lacks the tensor {key} that {INDEX_FILE} places there; "
                    "the shard and the index do not belong together"
                )
        tensors.update(found)
    return tensors


def _shards_of_index(index: Path) -> dict[str, list[str]]:
    """Names of the tensors that the index places in each shard; every shard exists."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map naming the shard of each tensor")
    shards: dict[str, list[str]] = {}
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} places {key} in {shard!r}; expected a file name")
        shards.setdefault(shard, []).append(key)
    for shard in sorted(shards):
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"{index.parent / shard} is missing, one of the {len(shards)} shards that "
                f"{INDEX_FILE} names; fetch the checkpoint again"
            )
    return shards


def _tensors_of_file(file: Path) -> dict[str, StoredTensor]:
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118
            described = {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); fetch it again"
        ) from error
    return {
        key: StoredTensor(file, key, DTYPES[dtype], shape)
        for key, (dtype, shape) in described.items()
        if dtype in DTYPES  # others (integer buffers) are not parameters
    }


def _same_values(one: StoredTensor, other: StoredTensor | None) -> bool:
    """Whether two stored tensors are copies: some checkpoints store a tied parameter twice."""
    if other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    values = []
    for stored in (one, other):
        with safetensors.safe_open(stored.file, framework="pt") as handle:
            values.append(handle.get_tensor(stored.key))
    return torch.equal(*values)


def _locate_parameters(
    directory: Path, architecture: str, config: transformers.PreTrainedConfig
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Match the stored tensors to the module's parameters, under transformers' own renamings."""
    stored = _stored_tensors(directory)
    with torch.device("meta"):
        model = getattr(transformers, architecture)._from_config(config)
    state = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    parameters: dict[str, StoredTensor] = {}
    for key, tensor in stored.items():
        name, converted = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if converted is not None:
            raise UnsupportedArchitectureError(
                f"the tensor {key} of {tensor.file.name} is stored in an older layout "
                f"({converted}); load and save the checkpoint once with transformers"
            )
        if name in shapes:
            parameters[name] = tensor
    tied = {
        target: source
        for target, source in (model.all_tied_weights_keys or {}).items()
        if target not in parameters or _same_values(parameters[target], parameters.get(source))
    }
    for target in tied:
        parameters.pop(target, None)
    for name, shape in shapes.items():
        if name in tied:
            continue
        if name not in parameters:
            raise CheckpointError(
                f"{directory} has no tensor for {name} {list(shape)}; "
                f"it is not a whole {architecture} checkpoint"
            )
        if parameters[name].shape != shape:
            raise CheckpointError(
                f"{parameters[name].file.name}: {parameters[name].key} has shape "
                f"{list(parameters[name].shape)}; config.json asks for {list(shape)}"
            )
    return parameters, tied
