"""The work that is timed: one function per workload, from an engine and a repetition to figures.

Nothing is answered from a cache: in the engines that are timed (`open_engine`) neither prefixes nor
image features are reused, and each repetition has a prompt of its own. The engines of a comparison
get the same prompt in the same repetition.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmcompile.evaluate.samples import EvaluationSample
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.options import EngineOptions
from glmcompile.runtime.request import Completion
from glmcompile.runtime.sampling_params import SamplingParams

PROMPT_TOKENS = 512  # of a text model's single request
REQUEST_TOKENS = 256  # of text prompts that arrive together


def open_engine(path: str | Path, threads: int | None) -> Engine:
    """An engine that computes every request in full."""
    options = EngineOptions(threads=threads, prefix_caching=False, encoder_cache_bytes=0)
    return Engine(path, options)


class TextStream:
    """Ordinary text as one long run of tokens, from which prompts are cut."""

    def __init__(self, engine: Engine) -> None:
        from calibration.texts import texts

        text = "\n\n".join([*texts("evaluation"), *texts("calibration")])
        self._ids = engine.prompts.tokenizer.encode(text, add_special_tokens=False).ids

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
        """One text prompt of 512 tokens, or as many as the context holds, and its answer."""
        length = min(PROMPT_TOKENS, self.context_length - self.answer_tokens)
        done = self._generate(engine, [{"token_ids": self.text.prompt(length, repetition)}])[0]
        return {
            "text_prompt_tokens": length,
            "ttft_ms": done.timings.ttft * 1e3,
            "tpot_ms": done.timings.per_token * 1e3,
        }

    def prefill(self, engine: Engine, repetition: int, tokens: int) -> dict[str, float]:
        """`tokens` tokens of text to the first token of the answer."""
        prompt = {"token_ids": self.text.prompt(tokens, repetition)}
        done = self._generate(engine, [prompt], answer_tokens=1)[0]
        return {f"prefill_tokens_per_s.{tokens}": tokens / done.timings.prefill}

    def decode(self, engine: Engine, repetition: int, context: int) -> dict[str, float]:
        """An answer around `context` tokens after the beginning, its prefill left out.

        Python's percentage is of the time between tokens: what is not spent in the graphs.
        """
        length = min(context - self.answer_tokens // 2, self.context_length - self.answer_tokens)
        engine.clear_caches()
        sampling = self._sampling(self.answer_tokens)
        with engine.stream(sampling, token_ids=self.text.prompt(length, repetition)) as stream:
            stream.wait()
            began, in_graphs = engine.graph_seconds()
            while stream.completion is None:
                stream.wait()
            ended, graphs_after = engine.graph_seconds()
        return {
            f"decode_tokens_per_s.{context}": 1 / stream.completion.timings.per_token,
            f"decode_python_percent.{context}": 100
            * (1 - (graphs_after - in_graphs) / (ended - began)),
        }

    def encode_phone_screen(self, engine: Engine, repetition: int) -> dict[str, float]:
        """The vision encoder on an image of a phone's size."""
        request = {"prompt": "", "images": [phone_screen(repetition)]}
        done = self._generate(engine, [request], answer_tokens=1)[0]
        return {"phone_screen_encode_ms": done.timings.vision * 1e3}

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

    def _generate(
        self, engine: Engine, requests: list[dict[str, Any]], answer_tokens: int | None = None
    ) -> list[Completion]:
        engine.clear_caches()
        sampling = self._sampling(answer_tokens or self.answer_tokens)
        return engine.generate_many([{**request, "sampling": sampling} for request in requests])

    def _sampling(self, answer_tokens: int) -> SamplingParams:
        return SamplingParams(max_tokens=answer_tokens, ignore_eos=True)

    def _screen(self, index: int) -> dict[str, Any]:
        sample = self.screens[index % len(self.screens)]
        return {"prompt": sample.prompt, "images": sample.images}


def phone_screen(seed: int = 0) -> NDArray[np.uint8]:
    """Noise uint8 [2400, 1080, 3], in a phone's resolution; what an image shows costs nothing."""
    return np.random.default_rng(seed).integers(0, 256, (2400, 1080, 3), np.uint8)


def screens(samples: Iterable[EvaluationSample], count: int) -> list[EvaluationSample]:
    """Up to `count` of the samples that show an image."""
    return list(islice((sample for sample in samples if sample.images), count))
