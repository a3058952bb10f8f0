"""An opened checkpoint: its configuration, and its parameters read one at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from glmcompile.checkpoint.json_files import read_json
from glmcompile.checkpoint.sources import Source, WeightFiles

if TYPE_CHECKING:
    from glmcompile.contract import Contract
    from glmcompile.export.components import Structure

ROWS_BYTES = 16 << 20  # how much of a tensor is converted to float32 at a time


class Checkpoint:
    """A validated checkpoint. Made by `open_checkpoint`.

    path: what was opened: a directory, or a GGUF file.
    directory: where its configuration, tokenizer and processor files lie; of a GGUF file those that
        were written from its metadata, which last as long as this object.
    architecture: name of the transformers class; config: its configuration, defaults filled in.
    parameters: parameter name in the transformers module -> where its values come from. A tied
        parameter (lm_head sharing the embedding) has no entry of its own; see `tied`.
    tied: name of each tied parameter -> name of the parameter it shares.
    notes: sentences on what its user should know, such as weights that were quantized before.
    """

    def __init__(
        self,
        path: Path,
        directory: Path,
        architecture: str,
        config: transformers.PreTrainedConfig,
        parameters: Mapping[str, Source],
        tied: Mapping[str, str],
        *,
        described_by: Sequence[Path],
        notes: Sequence[str] = (),
        held: Any = None,
    ) -> None:
        """described_by: files besides the weights that the hash covers. held: kept alive."""
        self.path = path
        self.directory = directory
        self.architecture = architecture
        self.config = config
        self.parameters = dict(parameters)
        self.tied = dict(tied)
        self.notes = tuple(notes)
        self._described_by = tuple(described_by)
        self._held = held
        self._weights = WeightFiles()

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
        return read_json(self.directory / "generation_config.json", optional=True)

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter's values: as stored (bfloat16, float16, float32), or else as computed.

        Of those that are stored as they are, pages are read when used.
        """
        return self._source(name).read(self._weights)

    def float32_rows(self, name: str) -> Iterator[torch.Tensor]:
        """A parameter as float32 blocks of whole rows of about 16 MB, so a copy never adds up."""
        source = self._source(name)
        if not source.shape:
            yield source.read(self._weights).float()
            return
        rows = max(1, ROWS_BYTES // max(1, math.prod(source.shape[1:]) * 4))
        for block in source.rows(self._weights, rows):
            yield block.to(torch.float32)

    def release(self) -> None:
        """Unmap the weight files, whose pages that were read count as this process's memory.

        Tensors that are still held stay valid; the next one read maps its file again.
        """
        self._weights.release()

    def _source(self, name: str) -> Source:
        return self.parameters[self.tied.get(name, name)]

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja chat template: chat_template.jinja, else the tokenizer's; None without one."""
        file = self.directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        for name in ("chat_template.json", "tokenizer_config.json"):
            template = read_json(self.directory / name, optional=True).get("chat_template")
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
        """Configuration and weight files, an adapter's too, in the order they are hashed in."""
        described = list(dict.fromkeys(self._described_by))
        weights = {file for source in self.parameters.values() for file in source.files}
        return [*described, *sorted(weights - set(described))]

    def hash(self, advance: Callable[[int], None] = lambda done: None) -> str:
        """SHA-256 over the names and bytes of `files`, as hexadecimal.

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
