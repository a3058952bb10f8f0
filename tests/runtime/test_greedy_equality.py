"""The greedy answer is transformers', alone, batched, chunked, preempted and from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from glmcompile.runtime.engine import Engine
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.request import Completion
from tests.engines import TinyEngine
from tests.runtime import reference
from tests.runtime.images import noise

Engines = Callable[..., TinyEngine]
Requests = list[dict[str, Any]]

ANSWER, PENALTY = 24, 1.5


def requests_for(family: str) -> Requests:
    """Prompts of several lengths; images of several sizes, two of them in one prompt."""
    prompts = ["Hi", "What does the title say? " * 5, "Öffne die Einstellungen", "x" * 150]
    images = [[], [noise(140, 100, 1)], [noise(60, 200, 2), noise(90, 90, 3)], [noise(84, 56, 4)]]
    return [
        {
            "prompt": prompt,
            "images": [] if family == "llama" else shown,
            "max_tokens": ANSWER,
            "ignore_eos": True,
            # Without it, a random model soon repeats itself and every test sees less.
            "repetition_penalty": PENALTY,
        }
        for prompt, shown in zip(prompts, images, strict=True)
    ]


Case = tuple[str, str]  # family, precision
CASES = [("glm4v", "fp32"), ("qwen2_vl", "fp32"), ("llama", "fp32"), ("glm4v", "int8")]


@pytest.fixture(params=CASES, ids=" ".join, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def answers_alone(tiny_engine: Engines) -> Callable[[Case], list[tuple[int, ...]]]:
    """Each answer by an engine that computes nothing else and reuses nothing."""

    @cache
    def answers(case: Case) -> list[tuple[int, ...]]:
        with tiny_engine(*case).open(prefix_caching=False) as engine:
            found = [engine.generate(**request).token_ids for request in requests_for(case[0])]
        # A model that said the same to everything would make every test here pass.
        assert len(set(found)) == len(found)
        assert all(len(ids) == ANSWER and len(set(ids)) > ANSWER // 2 for ids in found)
        return found

    return answers


@pytest.fixture
def alone(
    case: Case, answers_alone: Callable[[Case], list[tuple[int, ...]]]
) -> list[tuple[int, ...]]:
    return answers_alone(case)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """A tiny model's threads would wait for one another more than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def together(engine: Engine, family: str) -> tuple[list[tuple[int, ...]], list[Completion]]:
    completions = engine.generate_many(requests_for(family))
    return [completion.token_ids for completion in completions], completions


@pytest.mark.parametrize("family", ["glm4v", "qwen2_vl", "llama"])
def test_equal_to_transformers(
    family: str,
    answers_alone: Callable[[Case], list[tuple[int, ...]]],
    tiny_engine: Engines,
    one_torch_thread: None,
) -> None:
    import torch
    import transformers

    alone = answers_alone((family, "fp32"))
    directory = tiny_engine(family).checkpoint
    config = transformers.AutoConfig.from_pretrained(directory)
    model = getattr(transformers, config.architectures[0]).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    processor = reference.processor(directory, family)
    for request, answer in zip(requests_for(family), alone, strict=True):
        content: Any = request["prompt"]
        if request["images"]:
            shown = [{"type": "image", "image": image} for image in request["images"]]
            content = [*shown, {"type": "text", "text": request["prompt"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
        )
        theirs = model.generate(
            **inputs,
            max_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=-1,
            repetition_penalty=PENALTY,
        )
        assert tuple(theirs[0, inputs["input_ids"].shape[1] :].tolist()) == answer


def test_equal_in_a_batch(case: Case, alone: list[tuple[int, ...]], tiny_engine: Engines) -> None:
    with tiny_engine(*case).open(prefix_caching=False) as engine:
        assert together(engine, case[0])[0] == alone


@pytest.mark.parametrize("budget", [7, 33])
def test_equal_in_chunks(
    case: Case, alone: list[tuple[int, ...]], tiny_engine: Engines, budget: int
) -> None:
    options = {"max_batched_tokens": budget, "max_sequences": 4, "prefix_caching": False}
    # No room for features: an image's are kept only until the last chunk they fall into.
    with tiny_engine(*case).open(**options, encoder_cache_bytes=0) as engine:
        assert together(engine, case[0])[0] == alone


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_equal_after_preemption(
    case: Case, alone: list[tuple[int, ...]], tiny_engine: Engines, prefix_caching: bool
) -> None:
    longest = 250
    with tiny_engine(*case).open(block_size=8, prefix_caching=prefix_caching) as engine:
        bytes_per_block = engine.cache_bytes // engine.num_blocks
    pool = (longest + ANSWER) // 8 * bytes_per_block
    options = {"block_size": 8, "kv_cache_bytes": pool, "prefix_caching": prefix_caching}
    with tiny_engine(*case).open(**options) as engine:
        # With their images encoded, all can start at once, and there is not enough room for that.
        for request in requests_for(case[0]):
            engine.generate(**{**request, "max_tokens": 1})
        assert together(engine, case[0])[0] == alone
        stats = engine.stats()
        assert stats.preemptions > 0
        assert stats.kv_cache_usage == 0
        engine.check_integrity()


def test_equal_with_prefix_reuse(
    case: Case, alone: list[tuple[int, ...]], tiny_engine: Engines
) -> None:
    with tiny_engine(*case).open(block_size=8) as engine:
        assert together(engine, case[0])[0] == alone
        answers, completions = together(engine, case[0])
        assert answers == alone
        for completion in completions:
            usage = completion.usage
            assert usage.cached_tokens == (usage.prompt_tokens - 1) // 8 * 8


def test_another_image_under_the_same_text_is_not_taken_from_the_cache(
    tiny_engine: Engines,
) -> None:
    first, second = noise(140, 100, 1), noise(140, 100, 2)
    with tiny_engine("glm4v").open(block_size=8) as engine:
        request = {"prompt": "Where?", "max_tokens": ANSWER, "ignore_eos": True}
        one = engine.generate(**request, images=[first])
        other = engine.generate(**request, images=[second])
        engine.clear_caches()
        assert engine.generate(**request, images=[second]).token_ids == other.token_ids
        assert one.token_ids != other.token_ids
        assert one.usage.prompt_tokens == other.usage.prompt_tokens


def test_a_chat_goes_on_from_the_cache(tiny_engine: Engines) -> None:
    shown = {"type": "image", "image": np.asarray(noise(140, 100, 1))}
    chat = [{"role": "user", "content": [shown, {"type": "text", "text": "Where is it?"}]}]
    with tiny_engine("glm4v").open(block_size=8) as engine:
        ids = engine._inputs(Prompt(messages=chat)).token_ids
        answer = engine.generate(
            token_ids=ids, images=[shown["image"]], max_tokens=40, ignore_eos=True
        )
        following = [
            *ids,
            *answer.token_ids,
            *engine.prompts.encode(engine.prompts.whole("?")),
        ]
        second = engine.generate(token_ids=following, images=[shown["image"]], max_tokens=8)
        assert second.usage.cached_tokens >= len(ids) + 40 - 8
        assert second.timings.vision == 0
        engine.clear_caches()
        fresh = engine.generate(token_ids=following, images=[shown["image"]], max_tokens=8)
        assert fresh.token_ids == second.token_ids
        assert fresh.usage.cached_tokens == 0
