"""What is timed is computed: no prompt repeats another's beginning, no cache answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from glmcompile.bench.compare import make_workloads
from glmcompile.bench.workloads import open_engine
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.request import Request
from glmcompile.runtime.sampling_params import SamplingParams
from tests.engines import TinyEngine


@pytest.fixture
def engine(tiny_engine: Callable[..., TinyEngine]) -> Iterator[Engine]:
    with open_engine(tiny_engine("glm4v").path, threads=1) as opened:
        yield opened


def test_prompts_have_their_length_and_beginnings_of_their_own(engine: Engine) -> None:
    text = make_workloads(engine, 4, None).text
    prompts = [text.prompt(300, index) for index in range(64)]
    assert {len(prompt) for prompt in prompts} == {300}
    assert len({tuple(prompt[:32]) for prompt in prompts}) == 64
    assert text.prompt(300, 5) == prompts[5]


def test_decode_is_measured_around_its_context(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[dict] = []
    prepare = engine.prepare

    def record(prompt: Prompt, sampling: SamplingParams) -> Request:
        added.append({"answer": sampling.max_tokens, "prompt": len(prompt.token_ids or ())})
        return prepare(prompt, sampling)

    monkeypatch.setattr(engine, "prepare", record)
    workloads = make_workloads(engine, 8, None)
    context = engine.model.context_length
    figures = [workloads.decode(engine, 0, each) for each in (64, context)]
    # The last answer token is never fed back, so the longest context is filled to the end.
    assert added == [{"answer": 8, "prompt": 60}, {"answer": 8, "prompt": context - 8}]
    assert 0 < figures[0]["decode_python_percent.64"] < 100
    assert engine.stats().running == 0


def test_repeating_a_request_computes_all_of_it_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    completions = []
    generate = engine.generate_many

    def record(requests: list) -> list:
        completions.extend(done := generate(requests))
        return done

    monkeypatch.setattr(engine, "generate_many", record)
    workloads = make_workloads(engine, 4, None)
    for _ in range(2):
        workloads.screenshot(engine, 0)
        workloads.prefill(engine, 0, 128)
    assert [done.usage.cached_tokens for done in completions] == [0] * 4
    assert [done.timings.vision > 0 for done in completions] == [True, False] * 2
    assert [len(done.token_ids) for done in completions] == [4, 1] * 2
