"""The engine as its callers use it: streams, cancelling, threads, errors, limits."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glmcompile.errors import ArtifactError, ClosedError, InputError, OverloadedError
from glmcompile.runtime.encoder import EncoderCache
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.input_processor import InputProcessor, Prompt
from glmcompile.runtime.options import EngineOptions
from glmcompile.runtime.request import Completion, RequestOutput
from glmcompile.runtime.sampling_params import SamplingParams
from tests.engines import TinyEngine, wait_until_idle
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
    wait_until_idle(shared_engine)
    shared_engine.check_integrity()


class Recorder:
    """Takes a request's outputs on the stepping thread."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self.finished = threading.Event()

    def __call__(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        if output.finished:
            self.finished.set()

    @property
    def completion(self) -> Completion:
        assert self.finished.wait(300)
        assert self.outputs[-1].completion is not None, self.outputs[-1].error
        return self.outputs[-1].completion

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]


def submit(engine: Engine, prompt: Prompt, **sampling: Any) -> tuple[int, Recorder]:
    recorder = Recorder()
    return engine.submit(engine.prepare(prompt, SamplingParams(**sampling)), recorder), recorder


def test_a_stream_gives_the_text_of_generate_piece_by_piece(engine: Engine) -> None:
    whole = engine.generate(prompt="Hello", max_tokens=20, **LONG)
    with engine.stream(prompt="Hello", max_tokens=20, **LONG) as stream:
        pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == whole.text
    assert stream.completion is not None
    assert stream.completion.token_ids == whole.token_ids
    assert whole.text == engine.prompts.tokenizer.decode(list(whole.token_ids))


def test_a_completion_reports_usage_and_timings(engine: Engine) -> None:
    done = engine.generate(prompt="Hello", max_tokens=5, **LONG)
    assert done.finish_reason == "length"
    assert done.usage.completion_tokens == len(done.token_ids) == 5
    assert done.usage.prompt_tokens == len(
        engine.prompts.tokenizer.encode(
            engine.prompts.render([{"role": "user", "content": "Hello"}])
        ).ids
    )
    times = done.timings
    assert times.ttft == pytest.approx(times.preprocess + times.queue + times.prefill)
    assert times.total == pytest.approx(times.ttft + 4 * times.per_token)
    assert min(times.preprocess, times.queue, times.prefill, times.per_token) > 0
    assert times.vision == 0


def test_the_vision_encoder_runs_once_for_an_image_asked_about_twice(tiny_engine: Engines) -> None:
    with tiny_engine("glm4v").open() as engine:
        for question in ("What?", "Where?"):
            engine.generate(prompt=question, images=[noise(90, 90)], max_tokens=2)
        stats = engine.stats()
        assert stats.encoded_images == 1
        assert (stats.encoder_cache_queries, stats.encoder_cache_hits) == (2, 1)
        engine.generate(prompt="What?", images=[noise(90, 90, seed=1)], max_tokens=2)
        assert engine.stats().encoded_images == 2


def test_an_image_that_several_requests_wait_for_is_encoded_once(tiny_engine: Engines) -> None:
    request = {"prompt": "What?", "images": [noise(90, 90)], "max_tokens": 4}
    with tiny_engine("glm4v").open(prefix_caching=False, encoder_cache_bytes=0) as engine:
        alone = engine.generate(**request)
        together = engine.generate_many([request] * 4)
        assert [done.token_ids for done in together] == [alone.token_ids] * 4
        assert engine.stats().encoded_images == 2


def test_the_encoder_cache_drops_the_least_recently_used_and_keeps_its_bound() -> None:
    cache = EncoderCache(max_bytes=32)
    features = [np.full((1, 4), number, np.float32) for number in range(3)]
    cache.put(b"0", features[0])
    cache.put(b"1", features[1])
    assert cache.get(b"0") is features[0]
    cache.put(b"2", features[2])
    assert [cache.get(key) is not None for key in (b"0", b"1", b"2")] == [True, False, True]
    cache.put(b"large", np.zeros((4, 4), np.float32))
    assert cache.get(b"large") is None
    assert cache.num_bytes == 0


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
    _, kept = submit(engine, Prompt(prompt="Hello"), max_tokens=30, **LONG)
    with engine.stream(prompt="World", **LONG) as stream:
        next(stream)
        engine.cancel(stream.id)
        engine.cancel(12345)
        pieces = [*stream]
    assert stream.completion is not None
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text.endswith("".join(pieces))
    assert 0 < len(stream.completion.token_ids) < engine.context_length // 2
    assert kept.completion.finish_reason == "length"
    assert len(kept.completion.token_ids) == 30


def test_a_request_cancelled_at_once_is_reported(engine: Engine) -> None:
    id, recorder = submit(engine, Prompt(prompt="Hello"), **LONG)
    engine.cancel(id)
    assert recorder.completion.finish_reason == "cancelled"
    assert recorder.outputs[-1].id == id
    assert len(recorder.outputs[-1].completion.token_ids) < engine.context_length // 2


def test_a_stream_that_is_dropped_gives_its_blocks_back(engine: Engine) -> None:
    stream = engine.stream(prompt="Hello", **LONG)
    next(stream)
    del stream
    gc.collect()
    wait_until_idle(engine)
    assert engine.stats().kv_cache_usage == 0
    assert engine.stats().generation_tokens > 0


def test_outputs_are_delivered_as_they_come(engine: Engine) -> None:
    id, recorder = submit(engine, Prompt(prompt="Hello"), max_tokens=5, **LONG)
    completion = recorder.completion
    assert [output.id for output in recorder.outputs] == [id] * 5
    assert recorder.token_ids == list(completion.token_ids)
    assert "".join(output.text for output in recorder.outputs) == completion.text
    assert [output.finished for output in recorder.outputs] == [False] * 4 + [True]


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


def test_a_listener_that_raises_stalls_nobody(engine: Engine) -> None:
    def broken(output: RequestOutput) -> None:
        raise RuntimeError("a bug in the listener")

    engine.submit(engine.prepare(Prompt(prompt="x"), SamplingParams(max_tokens=4)), broken)
    assert len(engine.generate(prompt="Hello", max_tokens=5, **LONG).token_ids) == 5


def test_more_requests_than_the_queue_holds_are_refused_and_later_ones_are_not(
    tiny_engine: Engines,
) -> None:
    with tiny_engine("llama").open(max_sequences=1, max_queue=2) as engine:
        taken = [submit(engine, Prompt(prompt="x"), **LONG) for _ in range(3)]
        with pytest.raises(OverloadedError, match="3 requests are unfinished") as refused:
            submit(engine, Prompt(prompt="x"), max_tokens=1)
        assert refused.value.retry_after >= 1
        for id, recorder in taken:
            engine.cancel(id)
            assert recorder.completion.finish_reason == "cancelled"
        assert len(engine.generate(prompt="x", max_tokens=3, **LONG).token_ids) == 3
        # It queues for itself, without more than the engine takes.
        many = engine.generate_many([{"prompt": "x", "max_tokens": 2}] * 3)
        assert len(many) == 3


def test_draining_finishes_what_is_there_and_takes_nothing_new(tiny_engine: Engines) -> None:
    with tiny_engine("llama").open() as engine:
        _, recorder = submit(engine, Prompt(prompt="x"), max_tokens=40, **LONG)
        assert engine.drain(300)
        assert len(recorder.completion.token_ids) == 40
        with pytest.raises(ClosedError, match="takes no further requests"):
            engine.generate(prompt="x")


def test_closing_ends_what_is_unfinished_with_an_error(tiny_engine: Engines) -> None:
    with tiny_engine("glm4v").open(faults="encoder:200ms") as engine:
        running = submit(engine, Prompt(prompt="x"), **LONG)[1]
        encoding = submit(engine, Prompt(prompt="x", images=[noise(90, 90)]), **LONG)[1]
        assert not engine.drain(0.05)
    for recorder in (running, encoding):
        assert recorder.finished.wait(60)
        assert isinstance(recorder.outputs[-1].error, ClosedError)


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


def test_a_limited_context_ends_answers_and_refuses_prompts(tiny_engine: Engines) -> None:
    with tiny_engine("llama").open(max_model_len=40) as engine:
        assert len(engine.generate(token_ids=[65] * 30, **LONG).token_ids) == 10
        with pytest.raises(InputError, match="40 tokens but the context was limited to 40"):
            engine.generate(token_ids=[65] * 40)


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
        engine.generate(**request_)
    assert engine.stats().running == engine.stats().waiting == 0


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
        engine.generate(**request_)


def test_raw_text_and_tokens_give_the_chats_answer(tiny_engine: Engines) -> None:
    image = noise(90, 60)
    with tiny_engine("glm4v").open() as engine:
        whole = engine.generate(prompt="What?", images=[image], max_tokens=8, **LONG)
        message = engine.prompts.user_message("What?", [image])
        chat = engine.generate(messages=[message], max_tokens=8, **LONG)
        text = engine.prompts.render(engine.prompts.split_images([message])[0])
        raw = engine.generate(text=text, images=[image], max_tokens=8, **LONG)
        bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        given = engine.generate(messages=bare, images=[np.asarray(image)], max_tokens=8, **LONG)
    assert whole.token_ids == chat.token_ids == raw.token_ids == given.token_ids


def test_a_closed_engine_says_so(tiny_engine: Engines) -> None:
    engine = tiny_engine("llama").open()
    engine.close()
    for use in (engine.generate, engine.stream):
        with pytest.raises(ClosedError, match="the engine is closed"):
            use(prompt="Hello")
    engine.close()


def test_options_out_of_range_are_named(tiny_engine: Engines) -> None:
    with pytest.raises(InputError, match="max_sequences is 0"):
        EngineOptions(max_sequences=0)
    with pytest.raises(InputError, match="max_queue is -1"):
        EngineOptions(max_queue=-1)
    with pytest.raises(InputError, match="max_model_len is 99999 but the model's context is"):
        tiny_engine("llama").open(max_model_len=99999)
    with pytest.raises(InputError, match="max_batched_tokens is 4 and max_sequences 8"):
        tiny_engine("llama").open(max_batched_tokens=4)


def test_a_directory_that_is_no_engine_is_named(tiny_engine: Engines) -> None:
    with pytest.raises(ArtifactError, match="it is a checkpoint; compile it first"):
        Engine(tiny_engine("llama").checkpoint)


def test_one_session_per_component_serves_every_step(
    tiny_engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    tiny = tiny_engine("glm4v")  # compiled before sessions are counted
    opened = []
    original = onnxruntime.InferenceSession.__init__

    def counting(self: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        opened.append(path)
        original(self, path, *args, **kwargs)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", counting)
    with tiny.open() as engine:
        for size in (60, 90):
            engine.generate(prompt="What?", images=[noise(size, size)], max_tokens=4)
    assert sorted(Path(os.fsdecode(path)).stem for path in opened) == ["decoder", "vision_encoder"]


def test_several_answers_to_a_prompt_share_its_processing_and_nothing_else(
    tiny_engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, processed = InputProcessor.__call__, []

    def counting(self: InputProcessor, *arguments: Any) -> Any:
        processed.append(arguments)
        return process(self, *arguments)

    monkeypatch.setattr(InputProcessor, "__call__", counting)
    with tiny_engine("glm4v").open() as engine:
        prompt = Prompt(prompt="What?", images=[noise(90, 60)])
        samplings = [SamplingParams(max_tokens=count, **LONG) for count in (3, 7)]
        recorders = [Recorder(), Recorder()]
        requests = engine.prepare_several(prompt, samplings)
        for request, recorder in zip(requests, recorders, strict=True):
            engine.submit(request, recorder)
        short, long = (recorder.completion.token_ids for recorder in recorders)
    assert (len(short), len(long)) == (3, 7)
    assert long[:3] == short
    assert len(processed) == 1
