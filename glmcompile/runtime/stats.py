"""What an engine tells of its work: counters and gauges, and a listener for what happens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from glmcompile.runtime.request import Completion


@dataclass
class Counters:
    """Totals since the engine was opened; written by the stepping thread alone.

    prompt_tokens: of requests that were admitted; of them, cached_tokens were in the prefix cache.
    encoder_cache_queries, encoder_cache_hits: images of admitted requests, and those whose features
        or tokens were there already.
    failed_steps: decoder calls and image encodings that raised, repetitions included.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    encoder_cache_queries: int = 0
    encoder_cache_hits: int = 0
    encoded_images: int = 0
    preemptions: int = 0
    failed_steps: int = 0


@dataclass(frozen=True)
class EngineStats:
    """One look at an engine; every figure is right, though not all of the very same moment.

    running, waiting: requests. kv_cache_usage: blocks in use, 0 to 1; blocks that are kept for
    their prefix alone count as free. prefix_cache_queries, prefix_cache_hits: tokens.
    encoder_cache_queries, encoder_cache_hits: images. encoder_cache_bytes: features kept.
    healthy: false while steps fail one after the other.
    """

    running: int
    waiting: int
    kv_cache_usage: float
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    encoder_cache_queries: int
    encoder_cache_hits: int
    encoder_cache_bytes: int
    encoded_images: int
    steps: int
    failed_steps: int
    healthy: bool


class Observer(Protocol):
    """Hears of an engine's work, on the stepping thread: be quick, and do not raise."""

    def on_step(self, tokens: int, seconds: float) -> None:
        """A step has computed `tokens` tokens of prompts and answers."""

    def on_finished(self, completion: Completion) -> None:
        """A request has ended, cancelled ones included."""
