"""The core's promise: a failure ends one request and no other, and leaves no block behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest

from glmcompile.artifact import open_artifact
from glmcompile.errors import ComputeError, DeadlineError
from glmcompile.runtime.core import EngineCore
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.opening import open_core
from glmcompile.runtime.request import RequestOutput
from glmcompile.runtime.sampling_params import SamplingParams
from tests.engines import TinyEngine
from tests.runtime.images import noise

Engines = Callable[[str], TinyEngine]

LONG = {"ignore_eos": True, "repetition_penalty": 1.5}


class Stepper:
    """A core that is stepped by hand, and an engine that prepares its requests."""

    def __init__(self, tiny: TinyEngine) -> None:
        self.engine = tiny.open()
        self.core: EngineCore = open_core(open_artifact(tiny.path), self.engine.options)
        self._ids = count()

    def add(self, prompt: str = "Hello", images: Any = (), **options: Any) -> int:
        given = {name: options.pop(name) for name in ("priority", "timeout") if name in options}
        sampling = SamplingParams(**{"max_tokens": 8, **LONG, **options})
        request = self.engine.prepare(Prompt(prompt=prompt, images=images), sampling, **given)
        request.sequence.id = next(self._ids)
        self.core.add(request)
        return request.sequence.id

    def run(self) -> dict[int, RequestOutput]:
        """Step until all work is done; returns every request's last output."""
        last = {}
        while self.core.has_work:
            if self.core.is_blocked:
                assert self.core.encoder is not None
                self.core.encoder.wait()
            last |= {output.id: output for output in self.core.step() if output.finished}
            self.core.check_integrity()
        assert self.core.blocks.num_free_blocks == self.core.blocks.num_blocks
        return last

    def answer(self, **request: Any) -> tuple[int, ...]:
        id = self.add(**request)
        completion = self.run()[id].completion
        assert completion is not None
        return completion.token_ids


@pytest.fixture
def text(tiny_engine: Engines) -> Iterator[Stepper]:
    stepper = Stepper(tiny_engine("llama"))
    yield stepper
    stepper.run()
    stepper.engine.close()


@pytest.fixture
def vision(tiny_engine: Engines) -> Iterator[Stepper]:
    stepper = Stepper(tiny_engine("glm4v"))
    yield stepper
    stepper.run()
    stepper.core.close()
    stepper.engine.close()


def failing(core: EngineCore, monkeypatch: pytest.MonkeyPatch, when: Callable[..., bool]) -> None:
    """Have the decoder raise after its work, caches written, whenever `when(chunks)`."""
    run = core.runner.run

    def broken(chunks: Any, features: Any) -> Any:
        logits = run(chunks, features)
        if when(chunks):
            raise MemoryError("no memory for this step")
        return logits

    monkeypatch.setattr(core.runner, "run", broken)


def test_a_step_that_fails_once_is_run_again_and_nobody_notices(
    text: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["one", "two", "three"]
    alone = [text.answer(prompt=prompt) for prompt in prompts]
    calls = count()
    failing(text.core, monkeypatch, lambda chunks: next(calls) % 3 == 0)
    ids = [text.add(prompt) for prompt in prompts]
    last = text.run()
    assert [last[id].completion.token_ids for id in ids] == alone
    assert text.core.counters.failed_steps >= 3


def test_a_request_that_always_fails_is_found_and_ended_alone(
    text: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["one", "two", "bad", "three", "four"]
    alone = [text.answer(prompt=prompt) for prompt in prompts]
    ids = [text.add(prompt) for prompt in prompts]
    failing(text.core, monkeypatch, lambda chunks: any(c.sequence.id == ids[2] for c in chunks))
    last = text.run()
    assert isinstance(last[ids[2]].error, ComputeError)
    assert "no memory for this step" in str(last[ids[2]].error)
    for place in (0, 1, 3, 4):
        assert last[ids[place]].completion.token_ids == alone[place]


def test_logits_that_are_not_numbers_end_their_request_alone(
    text: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = text.answer(prompt="good")
    good, bad = text.add("good"), text.add("bad")
    run = text.core.runner.run

    def broken(chunks: Any, features: Any) -> Any:
        logits = run(chunks, features)
        rows = [chunk.sequence.id for chunk in chunks if chunk.samples]
        if bad in rows:
            logits[rows.index(bad)] = np.nan
        return logits

    monkeypatch.setattr(text.core.runner, "run", broken)
    last = text.run()
    assert isinstance(last[bad].error, ComputeError)
    assert last[good].completion.token_ids == alone
    # What was computed into NaN is not offered to others as a prefix.
    monkeypatch.setattr(text.core.runner, "run", run)
    assert text.answer(prompt="bad", max_tokens=3)


def test_an_error_in_choosing_a_token_ends_its_request_alone(
    text: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = text.answer(prompt="good")
    good, bad = text.add("good"), text.add("bad", temperature=1.0)
    state = text.core._requests[bad].sampling

    def broken(token: int) -> None:
        raise ValueError("a processor's bug")

    monkeypatch.setattr(state, "accept", broken)
    last = text.run()
    assert "a processor's bug" in str(last[bad].error)
    assert last[good].completion.token_ids == alone


def test_repeated_failures_make_the_engine_unwell_until_a_step_succeeds(
    text: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        failing(text.core, broken, lambda chunks: True)
        for _ in range(3):
            text.add()
            assert isinstance(next(iter(text.run().values())).error, ComputeError)
        assert not text.core.healthy
    text.answer()
    assert text.core.healthy


def test_an_image_that_fails_once_is_encoded_again(
    vision: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {"prompt": "What?", "images": [noise(90, 90)]}
    alone = vision.answer(**shown)
    vision.core.clear_caches()
    encoder = vision.core.encoder
    assert encoder is not None
    encode, calls = encoder.encode, count()

    def broken(session: Any, image: Any) -> Any:
        if next(calls) == 0:
            raise MemoryError("no memory for this image")
        return encode(session, image)

    monkeypatch.setattr(encoder, "encode", broken)
    assert vision.answer(**shown) == alone


def test_an_image_that_always_fails_ends_the_requests_that_show_it_alone(
    vision: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = noise(90, 90, 1), noise(90, 90, 2)
    alone = vision.answer(prompt="What?", images=[good])
    vision.core.clear_caches()
    encoder = vision.core.encoder
    assert encoder is not None
    encode, (digest,) = encoder.encode, {vision.engine._inputs._images(bad).digest}

    def broken(session: Any, image: Any) -> Any:
        if image.digest == digest:
            raise MemoryError("no memory for this image")
        return encode(session, image)

    monkeypatch.setattr(encoder, "encode", broken)
    ids = [vision.add("What?", [image]) for image in (bad, good, bad)]
    last = vision.run()
    assert last[ids[1]].completion.token_ids == alone
    for id in (ids[0], ids[2]):
        assert "encoding an image failed twice" in str(last[id].error)


def test_text_is_answered_while_an_image_is_encoded(
    vision: Stepper, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    encoder, go_on = vision.core.encoder, threading.Event()
    assert encoder is not None
    encode = encoder.encode

    def waiting(session: Any, image: Any) -> Any:
        assert go_on.wait(60)
        return encode(session, image)

    monkeypatch.setattr(encoder, "encode", waiting)
    monkeypatch.setattr(vision.core._pacer, "pause", lambda seconds, decoding: 0.0)
    shown, text = vision.add("What?", [noise(90, 90)]), vision.add("Hello")
    last: dict[int, RequestOutput] = {}
    while text not in last:
        last |= {output.id: output for output in vision.core.step() if output.finished}
    assert shown not in last
    go_on.set()
    assert vision.run()[shown].completion is not None


def test_a_cancelled_request_stops_its_image_from_being_encoded(vision: Stepper) -> None:
    first, second = (vision.add("What?", [noise(90, 90, seed)]) for seed in (1, 2))
    vision.core.cancel(second)
    vision.run()
    assert vision.core.counters.encoded_images == 1
    assert first != second


def test_features_are_kept_for_as_long_as_a_prompt_needs_them(vision: Stepper) -> None:
    vision.add("What?", [noise(90, 90)], max_tokens=4)
    while not any(output.token_ids for output in vision.core.step()):
        pass
    assert not vision.core._features


def test_a_request_past_its_deadline_ends_with_an_error_and_others_go_on(text: Stepper) -> None:
    late = text.add("late", timeout=1e-9)
    kept = text.add("kept", timeout=300)
    last = text.run()
    assert isinstance(last[late].error, DeadlineError)
    assert "time-out of 1e-09 s" in str(last[late].error)
    assert last[kept].completion.finish_reason == "length"


@pytest.mark.parametrize("fault", ["decoder:error@0.2", "encoder:error@0.3", "tokenizer:1ms"])
def test_injected_faults_leave_answers_as_they_are(tiny_engine: Engines, fault: str) -> None:
    requests = [
        {"prompt": f"What {n}?", "images": [noise(90, 90, n)], "max_tokens": 6, **LONG}
        for n in range(6)
    ]
    with tiny_engine("glm4v").open() as engine:
        well = [done.token_ids for done in engine.generate_many(requests)]
    with tiny_engine("glm4v").open(faults=fault) as engine:
        done = answers_of(engine, requests)
        assert [ids for ids in done if ids is not None] == [
            whole for ids, whole in zip(done, well, strict=True) if ids is not None
        ]
        # Twice in a row by chance, a request may fail; most do not.
        assert sum(ids is None for ids in done) <= 2
        assert (engine.stats().failed_steps > 0) == ("error" in fault)
        engine.check_integrity()


def answers_of(engine: Engine, requests: list[dict[str, Any]]) -> list[tuple[int, ...] | None]:
    found: list[tuple[int, ...] | None] = []
    for request in requests:
        try:
            found.append(engine.generate(**request).token_ids)
        except ComputeError:
            found.append(None)
    return found


@pytest.mark.parametrize("wrong", ["decoder", "decoder:slow", "disk:error", "encoder:error@2"])
def test_faults_that_do_not_exist_are_named(tiny_engine: Engines, wrong: str) -> None:
    with pytest.raises(Exception, match=wrong):
        tiny_engine("llama").open(faults=wrong)
