"""LoRA adapters as PEFT writes them, merged into the weights when these are read.

W + scale * B @ A, with scale = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA); "LoRA: Low-Rank
Adaptation of Large Language Models", arXiv:2106.09685. Layout of the files: peft/tuners/lora and
peft/utils/save_and_load.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from glmcompile.checkpoint.conversions import Conversion, parameters_of
from glmcompile.checkpoint.json_files import read_json
from glmcompile.checkpoint.safetensors_files import refuse_pickles, tensors_of_file
from glmcompile.checkpoint.sources import Source, WeightFiles
from glmcompile.errors import CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$"
)
# What a LoRA adapter may set without being more than B @ A, or that is refused elsewhere.
_PLAIN_SETTINGS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Ways to begin that change the base's weights, too, which the adapter's files do not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "orthogonal")


@dataclass(frozen=True)
class Adapted(Source):
    """A weight with a LoRA's product added.

    a, b: [r, in] and [out, r]. transposed: the product is added as [in, out], as embeddings hold
    their weight.
    """

    base: Source
    a: Source
    b: Source
    scale: float
    transposed: bool
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.base.files, *self.a.files, *self.b.files)

    def read(self, files: WeightFiles) -> torch.Tensor:
        return next(self._added(files, [self.base.read(files)]))

    def rows(self, files: WeightFiles, count: int) -> Iterator[torch.Tensor]:
        yield from self._added(files, self.base.rows(files, count))

    def _added(self, files: WeightFiles, blocks: Any) -> Iterator[torch.Tensor]:
        left, right = (each.read(files).float().flatten(1) for each in (self.b, self.a))
        if self.transposed:
            left, right = right.T, left.T
        start = 0
        for block in blocks:
            delta = left[start : start + len(block)] @ right
            start += len(block)
            yield torch.add(block.float(), delta.view(block.shape), alpha=self.scale)

    def __str__(self) -> str:
        return str(self.base)


@dataclass(frozen=True)
class _Pair:
    """The two factors for one module's weight; `weight` is its name in the adapter's words."""

    weight: str
    a: Source
    b: Source
    scale: float
    embedding: bool


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors. saved: whole parameters that replace the checkpoint's."""

    directory: Path
    settings: Mapping[str, Any]
    pairs: tuple[_Pair, ...]
    saved: Mapping[str, Source]

    @property
    def files(self) -> list[Path]:
        return [self.directory / CONFIG, self.directory / WEIGHTS]

    def merged_into_stored(
        self, stored: Mapping[str, Source], conversion: Conversion
    ) -> dict[str, Source]:
        """Stored tensors, with those adapted that are converted before they are parameters."""
        result = dict(stored)
        for pair in self._before(stored, conversion):
            fan_in_first = bool(self.settings.get("fan_in_fan_out"))
            result[pair.weight] = self._adapted(stored[pair.weight], pair, fan_in_first)
        return result

    def merged(
        self,
        parameters: Mapping[str, Source],
        tied: Mapping[str, str],
        conversion: Conversion,
        stored: Mapping[str, Source],
    ) -> tuple[dict[str, Source], dict[str, str]]:
        """The parameters with the adapter in them, and those that are still tied.

        A head that shares the embedding's weight is adapted apart from it, as it is while such an
        adapter is trained, unless the adapter ties them itself (ensure_weight_tying).
        stored: what `merged_into_stored` took.
        Raises CheckpointError for tensors that belong to no parameter, or are of another shape.
        """
        done = self._before(stored, conversion)
        adapted: dict[str, Source] = {}
        base = {name: parameters[tied.get(name, name)] for name in (*parameters, *tied)}
        unknown = [
            str(tensor) for key, tensor in self.saved.items()
            if conversion.rename(key)[0] not in conversion.state
        ]  # fmt: skip
        for name, source in parameters_of(self.saved, conversion).items():
            if source.shape != base[name].shape:
                raise CheckpointError(
                    f"{source} has shape {list(source.shape)}; {name} of the checkpoint has "
                    f"{list(base[name].shape)}. Give the checkpoint that the adapter was made for"
                )
            adapted[name] = source
        for pair in self.pairs:
            if pair in done:
                continue
            name, pattern = conversion.rename(pair.weight)
            if name not in base or pattern is not None:
                unknown += [str(pair.a), str(pair.b)]
                continue
            owner = conversion.model.get_submodule(name.rpartition(".")[0])
            transposed = pair.embedding or isinstance(owner, Conv1D)
            adapted[name] = self._adapted(adapted.get(name, base[name]), pair, transposed)
        if unknown:
            shown = ", ".join(unknown[:4])
            more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
            raise CheckpointError(
                f"{self.directory}: {shown}{more} belong to no parameter of the checkpoint's "
                f"{type(conversion.model).__name__}; give the checkpoint that it was made for"
            )
        together = bool(self.settings.get("ensure_weight_tying"))
        apart = {
            target
            for target, source in tied.items()
            if target in adapted or (source in adapted and not together)
        }
        result = {**parameters, **{name: base[name] for name in apart}, **adapted}
        return result, {name: source for name, source in tied.items() if name not in apart}

    def notes(self, directory: Path) -> list[str]:
        """directory: holds the checkpoint's tokenizer, which stays the one that is used."""
        own, base = self.directory / "tokenizer.json", directory / "tokenizer.json"
        if not own.is_file() or own.read_bytes() == base.read_bytes():
            return []
        return [
            f"{self.directory.name}: its tokenizer.json differs from the checkpoint's; the "
            "checkpoint's tokenizer and chat template are used."
        ]

    def _before(self, stored: Mapping[str, Source], conversion: Conversion) -> list[_Pair]:
        """Those whose weight is a part of a converted parameter."""
        found = []
        for pair in self.pairs:
            name, pattern = conversion.rename(pair.weight)
            if pair.weight in stored and (pattern is not None or name not in conversion.state):
                found.append(pair)
        return found

    def _adapted(self, base: Source, pair: _Pair, transposed: bool) -> Adapted:
        a, b = pair.a.shape, pair.b.shape
        shape = (a[1], b[0]) if transposed and len(a) == 2 else (b[0], *a[1:])
        if shape != base.shape or math.prod(b[2:]) != 1:
            raise CheckpointError(
                f"{pair.a} {list(a)} and {pair.b} {list(b)} make a weight of shape {list(shape)}; "
                f"{base} has {list(base.shape)}. Give the checkpoint that the adapter was made for"
            )
        return Adapted(base, pair.a, pair.b, pair.scale, transposed, base.shape)


def open_adapter(directory: Path) -> Adapter:
    """Read an adapter's settings and the headers of its tensors.

    Raises CheckpointError for files that are missing or damaged, and for adapters that are more
    than a product added to weights, by their name.
    """
    settings = read_json(directory / CONFIG)
    _check(directory / CONFIG, settings)
    file = directory / WEIGHTS
    if not file.is_file():
        refuse_pickles(directory)
        raise CheckpointError(f"{file} is missing; a LoRA adapter's directory needs it")
    sides: dict[str, dict[str, Source]] = {}
    embeddings, saved = set(), {}
    for key, tensor in tensors_of_file(file).items():
        if not key.startswith(PREFIX):
            raise CheckpointError(f"{tensor}: expected a name that begins with {PREFIX}")
        name = key.removeprefix(PREFIX)
        if match := _LORA.match(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
            if match["embedding"]:
                embeddings.add(match["module"])
        elif "lora_" in name or "trainable_tokens" in name:
            raise CheckpointError(
                f"{tensor} is of no LoRA that can be merged (A and B alone can, no DoRA, biases or "
                "single tokens); merge it with PEFT's `merge_and_unload` and give the result"
            )
        else:
            saved[re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", name)] = tensor
    pairs = []
    for module, pair in sides.items():
        if len(pair) != 2:
            raise CheckpointError(
                f"{next(iter(pair.values()))} stands alone; LoRA needs its A and its B, so the "
                "file is not whole; fetch it again"
            )
        a, b = pair["A"], pair["B"]
        rank, scale = _scale(settings, module)
        if len(a.shape) < 2 or len(b.shape) < 2 or not a.shape[0] == b.shape[1] == rank:
            raise CheckpointError(
                f"{a} {list(a.shape)} and {b} {list(b.shape)}: {CONFIG} gives rank {rank}, so "
                f"[{rank}, ...] and [..., {rank}] were expected"
            )
        pairs.append(_Pair(f"{module}.weight", a, b, scale, module in embeddings))
    if not pairs and not saved:
        raise CheckpointError(f"{file} holds no tensors; fetch it again")
    return Adapter(directory, settings, tuple(pairs), saved)


def _check(file: Path, settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what is no plain LoRA."""
    advice = "merge it with PEFT's `merge_and_unload`, `save_pretrained` it, and give the result"
    if (kind := settings.get("peft_type")) != "LORA":
        raise CheckpointError(f"{file} is of type {kind}; LORA was expected. Of another, {advice}")
    if settings.get("use_dora"):
        raise CheckpointError(f"{file} is a DoRA (use_dora), which is not merged here; {advice}")
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights is {begun}, which changes the checkpoint's own weights, "
            f"too; {advice}"
        )
    for name, value in settings.items():
        if value and name not in _PLAIN_SETTINGS:
            raise CheckpointError(f"{file} sets {name}, which is no part of plain LoRA; {advice}")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float):
            raise CheckpointError(f"{file} has no number {name}; fetch it again")


def _scale(settings: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scale of one module."""
    rank = _pattern(settings.get("rank_pattern"), module, settings["r"])
    alpha = _pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that ends a module's name, as PEFT's get_pattern_key."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
