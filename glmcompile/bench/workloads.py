"""The work that is timed: one function per workload, from an engine and a repetition to figures.

Nothing is answered from a cache: in the engines that are timed (`open_engine`) prefix reuse is off
and image features are kept for one image at most, which is forgotten before every measurement; and
each repetition has a prompt of its own. The engines of a comparison get the same prompt in the same
repetition.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from glmcompile.evaluate.samples import EvaluationSample
from glmcompile.families import supported
from glmcompile.runtime.engine import Engine, EngineOptions
from glmcompile.runtime.prompt import PromptBuilder
from glmcompile.runtime.request import Completion
from glmcompile.runtime.sequence import SamplingParams

PREFILL_TOKENS = 512
REQUEST_TOKENS = 256  # of text prompts that arrive together


def open_engine(path: str | Path, threads: int | None) -> Engine:
    """An engine that computes every request in full."""
    options = EngineOptions(threads=threads, prefix_caching=False, encoder_cache_bytes=0)
    return Engine(path, options)


class TextStream:
    """Ordinary text as one long run of tokens, from which prompts are cut."""

    def __init__(self, engine: Engine) -> None:
        from calibration.texts import texts

        prompts = PromptBuilder(engine.path, supported()[engine.model.family])
        text = "\n\n".join([*texts("evaluation"), *texts("calibration")])
        self._ids = prompts.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, tokens: int, index: int) -> list[int]:
        """`tokens` tokens; prompts of different indexes begin at different places."""
        # A stride that shares no factor with usual lengths visits every place before repeating.
        start = index * 1009 % len(self._ids)
        return list(islice(cycle(self._ids), start, start + tokens))


@dataclass(frozen=True)
class Workloads:
    """The prompts of one comparison; every method runs one measurement.

    screens: questions with images, for image models; empty for text models.
    answer_tokens: output of each request, end-of-sequence tokens ignored, so that every engine
    does the same work.
    """

    text: TextStream
    screens: Sequence[EvaluationSample]
    context_length: int
    answer_tokens: int

    def text_prompt(self, engine: Engine, repetition: int) -> dict[str, float]:
        """One text prompt of 512 tokens, or as many as the context holds: prefill and decode."""
        length = min(PREFILL_TOKENS, self.context_length - self.answer_tokens)
        done = self._generate(engine, [{"token_ids": self.text.prompt(length, repetition)}])[0]
        figures = {
            "text_prompt_tokens": length,
            "prefill_tokens_per_s": length / done.timings.prefill,
            "decode_tokens_per_s": 1 / done.timings.per_token,
        }
        if not self.screens:
            figures["ttft_ms"] = done.timings.ttft * 1e3
            figures["tpot_ms"] = done.timings.per_token * 1e3
        return figures

    def screenshot(self, engine: Engine, repetition: int) -> dict[str, float]:
        """One screen with its question, through processor and template, as an agent's step."""
        done = self._generate(engine, [self._screen(repetition)])[0]
        timings = done.timings
        return {
            "screenshot_prompt_tokens": done.usage.prompt_tokens,
            "preprocess_ms": timings.preprocess * 1e3,
            "vision_encode_ms": timings.vision * 1e3,
            "screenshot_prefill_tokens_per_s": done.usage.prompt_tokens
            / (timings.prefill - timings.vision),
            "ttft_ms": timings.ttft * 1e3,
            "tpot_ms": timings.per_token * 1e3,
        }

    def throughput(self, engine: Engine, repetition: int, requests: int) -> dict[str, float]:
        """`requests` at once, each with a prompt of its own: output tokens over the whole time."""
        first = repetition * requests
        if self.screens:
            batch = [self._screen(first + index) for index in range(requests)]
        else:
            length = min(REQUEST_TOKENS, self.context_length - self.answer_tokens)
            batch = [
                {"token_ids": self.text.prompt(length, first + index)} for index in range(requests)
            ]
        began = time.perf_counter()
        answers = self._generate(engine, batch)
        seconds = time.perf_counter() - began
        tokens = sum(len(answer.token_ids) for answer in answers)
        return {f"throughput_tokens_per_s.{requests}": tokens / seconds}

    def representative(self, engine: Engine) -> None:
        """The request whose memory is measured: a screenshot's, or a text model's long prompt."""
        (self.screenshot if self.screens else self.text_prompt)(engine, 0)

    def _generate(self, engine: Engine, requests: list[dict[str, Any]]) -> list[Completion]:
        engine.clear_caches()
        sampling = SamplingParams(max_tokens=self.answer_tokens, ignore_eos=True)
        return engine.generate_many([{**request, "sampling": sampling} for request in requests])

    def _screen(self, index: int) -> dict[str, Any]:
        sample = self.screens[index % len(self.screens)]
        return {"prompt": sample.prompt, "images": sample.images}


def screens(samples: Iterator[EvaluationSample], count: int) -> list[EvaluationSample]:
    """Up to `count` of the samples that show an image."""
    return list(islice((sample for sample in samples if sample.images), count))
