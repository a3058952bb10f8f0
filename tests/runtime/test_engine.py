"""The engine as its callers use it: streams, cancelling, threads, errors, limits."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from glmcompile.errors import ArtifactError, InputError
from glmcompile.runtime.engine import Engine, EngineOptions
from glmcompile.runtime.model_runner import EncoderCache
from glmcompile.runtime.sequence import SamplingParams
from tests.engines import TinyEngine
from tests.runtime.images import noise

Engines = Callable[[str], TinyEngine]

LONG = {"ignore_eos": True, "repetition_penalty": 1.5}


@pytest.fixture(scope="module")
def shared_engine(tiny_engine: Engines) -> Iterator[Engine]:
    with tiny_engine("llama").open() as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """A text engine with empty caches; a test must leave it without work and without blocks."""
    shared_engine.clear_caches()
    yield shared_engine
    while shared_engine.has_work:
        shared_engine.step()
    assert shared_engine._blocks.num_free_blocks == shared_engine.num_blocks
    assert not shared_engine._scheduler.has_work
    assert not shared_engine._streams


class CountingSession:
    """Counts the runs of a session."""

    def __init__(self, session: Any) -> None:
        self.session, self.count = session, 0

    def run(self, *arguments: Any) -> Any:
        self.count += 1
        return self.session.run(*arguments)


def run(engine: Engine) -> dict[int, Any]:
    """Step until all work is done; returns the completions."""
    completions = {}
    while engine.has_work:
        for output in engine.step():
            if output.completion is not None:
                completions[output.id] = output.completion
    return completions


def test_a_stream_gives_the_text_of_generate_piece_by_piece(engine: Engine) -> None:
    whole = engine.generate(prompt="Hello", max_tokens=20, **LONG)
    with engine.stream(prompt="Hello", max_tokens=20, **LONG) as stream:
        pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == whole.text
    assert stream.completion is not None
    assert stream.completion.token_ids == whole.token_ids
    assert whole.text == engine._inputs.prompts.tokenizer.decode(list(whole.token_ids))


def test_a_completion_reports_usage_and_timings(engine: Engine) -> None:
    done = engine.generate(prompt="Hello", max_tokens=5, **LONG)
    assert done.finish_reason == "length"
    assert done.usage.completion_tokens == len(done.token_ids) == 5
    assert done.usage.prompt_tokens == len(
        engine._inputs.prompts.tokenizer.encode(
            engine._inputs.prompts.render([{"role": "user", "content": "Hello"}])
        ).ids
    )
    times = done.timings
    assert times.ttft == pytest.approx(times.preprocess + times.queue + times.prefill)
    assert times.total == pytest.approx(times.ttft + 4 * times.per_token)
    assert min(times.preprocess, times.queue, times.prefill, times.per_token) > 0
    assert times.vision == 0


def test_the_vision_encoder_runs_once_for_an_image_asked_about_twice(tiny_engine: Engines) -> None:
    with tiny_engine("glm4v").open() as engine:
        runs = CountingSession(engine._open_runner()._vision)
        engine._open_runner()._vision = runs
        for question in ("What?", "Where?"):
            engine.generate(prompt=question, images=[noise(90, 90)], max_tokens=2)
        assert runs.count == 1
        engine.generate(prompt="What?", images=[noise(90, 90, seed=1)], max_tokens=2)
        assert runs.count == 2


def test_the_encoder_cache_drops_the_least_recently_used_and_keeps_the_newest() -> None:
    cache = EncoderCache(max_bytes=32)
    features = [np.full((1, 4), number, np.float32) for number in range(3)]
    cache.put(b"0", features[0])
    cache.put(b"1", features[1])
    assert cache.get(b"0") is features[0]
    cache.put(b"2", features[2])
    assert [cache.get(key) is not None for key in (b"0", b"1", b"2")] == [True, False, True]
    large = np.zeros((4, 4), np.float32)
    cache.put(b"large", large)
    assert cache.get(b"large") is large
    assert cache.get(b"2") is None


def test_an_end_of_sequence_token_stops_and_has_no_text(engine: Engine) -> None:
    free = engine.generate(prompt="Hello", max_tokens=12, **LONG)
    end = free.token_ids[6]
    place = free.token_ids.index(end)
    stopped = engine.generate(
        prompt="Hello", max_tokens=12, stop_token_ids=(end,), min_tokens=0, **LONG
    )
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: place + 1]
    late = engine.generate(
        prompt="Hello", max_tokens=12, stop_token_ids=(end,), min_tokens=place + 2, **LONG
    )
    assert len(late.token_ids) >= place + 2


def test_the_models_own_end_token_stops(engine: Engine) -> None:
    end = engine.model.eos_token_ids[0]
    # Of so many random answers some choose it.
    seeds = range(200)
    done = engine.generate_many(
        [{"prompt": "x", "max_tokens": 30, "temperature": 2.0, "seed": seed} for seed in seeds]
    )
    ended = [item for item in done if item.finish_reason == "stop"]
    assert ended
    assert all(item.token_ids[-1] == end for item in ended)
    assert all(end not in item.token_ids[:-1] for item in done)


def test_a_stop_string_ends_the_text_before_it(engine: Engine) -> None:
    tokens = engine.generate(prompt="Hello", max_tokens=20, logprobs=0, **LONG)
    text = tokens.text
    stop = text[4:6]
    stopped = engine.generate(prompt="Hello", max_tokens=20, stop=[stop], **LONG)
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]
    assert len(stopped.token_ids) < 20


def test_cancelled_requests_keep_what_they_have_and_others_go_on(engine: Engine) -> None:
    kept = engine.add_request(prompt="Hello", max_tokens=30, **LONG)
    dropped = engine.add_request(prompt="World", max_tokens=30, **LONG)
    waiting = engine.add_request(prompt="!", max_tokens=30, **LONG)
    engine.cancel(waiting)
    given = []
    for _ in range(6):
        given += [
            token for output in engine.step() if output.id == dropped for token in output.token_ids
        ]
    engine.cancel(dropped)
    engine.cancel(12345)
    completions = run(engine)
    assert completions[dropped].finish_reason == "cancelled"
    assert list(completions[dropped].token_ids) == given
    assert completions[kept].finish_reason == "length"
    assert len(completions[kept].token_ids) == 30


def test_a_request_cancelled_before_its_first_step_is_reported(engine: Engine) -> None:
    id = engine.add_request(prompt="Hello")
    engine.cancel(id)
    (output,) = engine.step()
    assert output.completion is not None
    assert (output.id, output.completion.finish_reason) == (id, "cancelled")
    assert output.completion.token_ids == ()


def test_a_stream_that_is_dropped_gives_its_blocks_back(engine: Engine) -> None:
    stream = engine.stream(prompt="Hello", max_tokens=500, **LONG)
    next(stream)
    del stream
    gc.collect()
    engine.step()
    assert not engine.has_work


def test_outputs_of_step_survive_while_a_stream_steps(engine: Engine) -> None:
    id = engine.add_request(prompt="Hello", max_tokens=5, **LONG)
    engine.generate(prompt="World", max_tokens=20, **LONG)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.id for output in outputs] == [id] * 5
    assert sum(len(output.token_ids) for output in outputs) == 5
    assert outputs[-1].completion is not None


def test_threads_share_one_engine(engine: Engine) -> None:
    prompts = [f"request number {number}" * (number + 1) for number in range(6)]
    alone = [engine.generate(prompt=p, max_tokens=15, **LONG).token_ids for p in prompts]
    answers: dict[str, tuple[int, ...]] = {}

    def ask(prompt: str) -> None:
        with engine.stream(prompt=prompt, max_tokens=15, **LONG) as stream:
            "".join(stream)
        assert stream.completion is not None
        answers[prompt] = stream.completion.token_ids

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert [answers[prompt] for prompt in prompts] == alone


def test_requests_join_a_loop_that_runs_in_another_thread(engine: Engine) -> None:
    completions: dict[int, Any] = {}
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            for output in engine.step():
                if output.completion is not None:
                    completions[output.id] = output.completion
                    if len(completions) == 4:
                        stop.set()
            stop.wait(0.001)

    thread = threading.Thread(target=loop)
    thread.start()
    ids = [engine.add_request(prompt=f"{n}", max_tokens=10, **LONG) for n in range(4)]
    thread.join(300)
    assert sorted(completions) == ids
    assert all(len(completion.token_ids) == 10 for completion in completions.values())


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(engine: Engine) -> None:
    sampled = {"prompt": "Hello", "temperature": 1.5, "top_p": 0.95, "max_tokens": 25}
    alone = engine.generate(**sampled, seed=5, ignore_eos=True)
    requests = [{**sampled, "seed": seed, "ignore_eos": True} for seed in (1, 5, 2)]
    batch = engine.generate_many(requests)
    assert batch[1].token_ids == alone.token_ids
    assert len({answer.token_ids for answer in batch}) == 3


def test_logprobs_come_with_every_token(engine: Engine) -> None:
    done = engine.generate(prompt="Hello", max_tokens=4, logprobs=3)
    assert [entry.token for entry in done.logprobs] == list(done.token_ids)
    for entry in done.logprobs:
        assert entry.top_logprobs[0] == (entry.token, entry.logprob)
        assert len(entry.top_logprobs) == 3


def test_an_answer_ends_where_the_context_does(engine: Engine) -> None:
    length = engine.model.context_length - 6
    done = engine.generate(token_ids=[65] * length, **LONG)
    assert (len(done.token_ids), done.finish_reason) == (6, "length")


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    limit = engine.model.context_length
    with pytest.raises(InputError, match=f"{limit + 5} tokens but the model's context is {limit}"):
        engine.generate(token_ids=[65] * (limit + 5))


def test_a_prompt_larger_than_the_cache_is_refused(tiny_engine: Engines) -> None:
    with (
        tiny_engine("llama").open(kv_cache_bytes=1) as engine,
        pytest.raises(InputError, match="100 tokens but the KV cache holds 32"),
    ):
        engine.generate(token_ids=[65] * 100)


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({}, "exactly one of prompt"),
        ({"prompt": "a", "text": "b"}, "exactly one of prompt"),
        ({"token_ids": []}, "the prompt is empty"),
        ({"token_ids": [1, 99999]}, "token id 99999 is not in the vocabulary"),
        ({"token_ids": [-1]}, "token id -1"),
        ({"prompt": "a", "images": ["x.png"]}, "takes text only"),
        ({"token_ids": [1], "images": ["x.png"]}, "takes text only"),
        ({"prompt": "a", "temprature": 1}, "no sampling option 'temprature'"),
        ({"prompt": "a", "top_p": 2}, "top_p is 2"),
        ({"prompt": "a", "sampling": SamplingParams(), "top_p": 0.5}, "'top_p', too"),
    ],
)
def test_requests_that_cannot_be_served_are_refused_at_once(
    engine: Engine, request_: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        engine.add_request(**request_)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"text": "<|image|> one too few", "images": []}, "1 image placeholders"),
        ({"text": "none", "images": [noise(60, 60)]}, "0 image placeholders and 1 images"),
        ({"text": "<|image|> <|image|>", "images": [noise(60, 60)]}, "2 image placeholders"),
        ({"prompt": "a", "images": [b"junk"]}, "image of 4 bytes.*: not a readable image"),
    ],
)
def test_image_requests_that_cannot_be_served_are_refused(
    tiny_engine: Engines, request_: dict[str, Any], complaint: str
) -> None:
    with tiny_engine("glm4v").open() as engine, pytest.raises(InputError, match=complaint):
        engine.add_request(**request_)


def test_raw_text_and_tokens_give_the_chats_answer(tiny_engine: Engines) -> None:
    image = noise(90, 60)
    with tiny_engine("glm4v").open() as engine:
        whole = engine.generate(prompt="What?", images=[image], max_tokens=8, **LONG)
        message = engine._inputs.prompts.user_message("What?", [image])
        chat = engine.generate(messages=[message], max_tokens=8, **LONG)
        text = engine._inputs.prompts.render(engine._inputs.prompts.split_images([message])[0])
        raw = engine.generate(text=text, images=[image], max_tokens=8, **LONG)
        bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        given = engine.generate(messages=bare, images=[np.asarray(image)], max_tokens=8, **LONG)
    assert whole.token_ids == chat.token_ids == raw.token_ids == given.token_ids


def test_a_failing_step_fails_its_requests_and_no_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = engine._open_runner()
    original = runner.run

    def broken(chunks: Any) -> Any:
        raise MemoryError("no memory for this step")

    id = engine.add_request(prompt="Hello", max_tokens=5)
    monkeypatch.setattr(runner, "run", broken)
    (output,) = engine.step()
    assert isinstance(output.error, MemoryError)
    assert output.id == id
    assert output.finished
    with pytest.raises(MemoryError, match="no memory"):
        engine.generate(prompt="Hello", max_tokens=5)
    monkeypatch.setattr(runner, "run", original)
    assert len(engine.generate(prompt="Hello", max_tokens=5, **LONG).token_ids) == 5


def test_a_closed_engine_says_so(tiny_engine: Engines) -> None:
    engine = tiny_engine("llama").open()
    engine.close()
    with pytest.raises(InputError, match="the engine is closed"):
        engine.generate(prompt="Hello")


def test_a_step_without_work_returns_at_once(engine: Engine) -> None:
    assert engine.step() == []


def test_options_out_of_range_are_named(tiny_engine: Engines) -> None:
    with pytest.raises(InputError, match="max_sequences is 0"):
        EngineOptions(max_sequences=0)
    with pytest.raises(InputError, match="max_batched_tokens is 4 and max_sequences 8"):
        tiny_engine("llama").open(max_batched_tokens=4)


def test_a_directory_that_is_no_engine_is_named(tiny_engine: Engines) -> None:
    with pytest.raises(ArtifactError, match="it is a checkpoint; compile it first"):
        Engine(tiny_engine("llama").checkpoint)


def test_one_session_per_component_serves_every_step(
    tiny_engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    opened = []
    original = onnxruntime.InferenceSession.__init__

    def counting(self: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        opened.append(path)
        original(self, path, *args, **kwargs)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", counting)
    with tiny_engine("glm4v").open() as engine:
        for size in (60, 90):
            engine.generate(prompt="What?", images=[noise(size, size)], max_tokens=4)
    assert len(opened) == 3
