"""How an engine is opened."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from glmcompile.contract import Contract
from glmcompile.errors import InputError


@dataclass(frozen=True)
class EngineOptions:
    """Sizes and switches, all with defaults.

    threads: of every component's session; None means all usable cores.
    max_sequences: requests computed at once; further ones wait.
    max_queue: requests that may wait besides; more are refused with an OverloadedError.
    max_model_len: tokens of a prompt and its answer together; None means the model's context.
    max_batched_tokens: tokens a step computes; longer prompts are computed in chunks of this.
    kv_cache_bytes: memory for keys and values, taken as it is first used; at most as much as
        max_sequences full contexts need, and at least one block.
    block_size: tokens per cache block.
    prefix_caching: reuse the cache of shared prompt beginnings.
    encoder_cache_bytes: memory for features of recent images.
    verify: compare every file of the engine with its SHA-256 when opening.
    faults: injected on purpose, to test what stands around the engine; see runtime/faults.py.
    """

    threads: int | None = None
    max_sequences: int = 16
    max_queue: int = 256
    max_model_len: int | None = None
    max_batched_tokens: int = 2048
    kv_cache_bytes: int = 1 << 30
    block_size: int = 32
    prefix_caching: bool = True
    encoder_cache_bytes: int = 256 << 20
    verify: bool = True
    faults: str = ""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_batched_tokens", "kv_cache_bytes", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.max_queue < 0:
            raise InputError(f"max_queue is {self.max_queue}; expected at least 0")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise InputError(f"max_model_len is {self.max_model_len}; expected at least 2")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> EngineOptions:
        """Raises InputError naming an option that does not exist."""
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"no engine option {name!r}; there are {', '.join(known)}")
        return cls(**options)

    @property
    def capacity(self) -> int:
        """Requests that may be unfinished at once, waiting ones included."""
        return self.max_sequences + self.max_queue

    def context_length(self, model: Contract) -> int:
        """Tokens of a prompt and its answer. Raises InputError for more than the model has."""
        if self.max_model_len is not None and self.max_model_len > model.context_length:
            raise InputError(
                f"max_model_len is {self.max_model_len} but the model's context is "
                f"{model.context_length}"
            )
        return self.max_model_len or model.context_length
