"""`/v1/chat/completions` through the official client and plain HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from tests.serve.requests import CHAT, LONG, SCREEN, ask, chat, png
from tests.serve.servers import ServerThread


@pytest.fixture
def client(server: ServerThread) -> OpenAI:
    return server.openai


def test_an_answer_is_the_engines_own(server: ServerThread, client: OpenAI) -> None:
    own = server.engine.generate(prompt="Open Chat.", images=[SCREEN], max_tokens=24)
    done = client.chat.completions.create(
        model="reference",
        messages=ask("Open Chat.", SCREEN.read_bytes()),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=24,
    )
    (choice,) = done.choices
    assert choice.message.content == own.text != ""
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert done.usage is not None
    assert done.usage.prompt_tokens == own.usage.prompt_tokens
    assert done.usage.completion_tokens == own.usage.completion_tokens
    assert done.usage.total_tokens == own.usage.prompt_tokens + own.usage.completion_tokens
    assert done.model == "reference"
    assert done.object == "chat.completion"
    assert done.id.startswith("chatcmpl-")


def test_a_stream_is_the_same_answer_in_pieces(client: OpenAI) -> None:
    request: Any = chat(model="reference", **{"extra_body": LONG})
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last = chunks
    assert len(pieces) > 5
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == (
        whole.choices[0].message.content
    )
    assert [chunk.choices[0].finish_reason for chunk in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 24
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_role_comes_with_the_first_text_and_nothing_before_it(server: ServerThread) -> None:
    *pieces, done = server.events(CHAT, chat(stream=True))
    assert done == "[DONE]"
    first, *others = [piece["choices"][0]["delta"] for piece in pieces]
    assert first["role"] == "assistant"
    assert first["content"]
    assert not any("role" in other for other in others)
    assert all("usage" not in piece for piece in pieces)


def test_counts_can_come_with_every_chunk(server: ServerThread) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last, _ = server.events(CHAT, chat(stream=True, stream_options=options, **LONG))
    counts = [piece["usage"]["completion_tokens"] for piece in pieces]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 24
    assert {piece["usage"]["prompt_tokens"] for piece in [*pieces, last]} == {9}


def test_several_images_and_turns_reach_the_engine(server: ServerThread) -> None:
    first, second = png(84, 84), png(112, 84, seed=1)
    messages = [
        {"role": "system", "content": "Answer."},
        *ask("One?", first),
        {"role": "assistant", "content": "do()"},
        *ask("Two?", first, second),
    ]
    done = server.post(CHAT, chat(messages=messages)).json()
    own = server.engine.generate(messages=messages, max_tokens=24)
    assert done["choices"][0]["message"]["content"] == own.text
    assert done["usage"]["prompt_tokens_details"]["image_tokens"] == own.usage.image_tokens > 0


def test_a_prompt_seen_before_is_reported_as_cached(server: ServerThread) -> None:
    messages = [{"role": "user", "content": "Open Chat and then Mail. " * 20}]
    first = server.post(CHAT, chat(messages=messages, max_tokens=2)).json()["usage"]
    again = server.post(CHAT, chat(messages=messages, max_tokens=2)).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["prompt_tokens_details"]["cached_tokens"] > 50


def test_n_answers_share_the_prompts_beginning_and_differ_by_seed(server: ServerThread) -> None:
    messages = [{"role": "user", "content": "Say something else. " * 20}]
    request = chat(messages=messages, n=3, temperature=3.0, seed=7, **LONG)
    before = server.engine.stats()
    done = server.post(CHAT, request).json()
    after = server.engine.stats()
    texts = [choice["message"]["content"] for choice in done["choices"]]
    assert [choice["index"] for choice in done["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert done["usage"]["completion_tokens"] == 3 * 24
    assert done["usage"]["total_tokens"] == done["usage"]["prompt_tokens"] + 3 * 24
    assert after.prefix_cache_hits - before.prefix_cache_hits > 2 * 50
    assert server.post(CHAT, request).json()["choices"] == done["choices"]
    second = server.post(CHAT, {**request, "n": 1, "seed": 8}).json()
    assert second["choices"][0]["message"]["content"] == texts[1]


def test_streamed_answers_of_one_request_are_told_apart(server: ServerThread) -> None:
    request = chat(n=2, temperature=3.0, seed=7, **LONG)
    whole = server.post(CHAT, request).json()
    texts = ["", ""]
    for piece in server.events(CHAT, {**request, "stream": True})[:-1]:
        for choice in piece["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


def test_logprobs_name_tokens_and_their_bytes(server: ServerThread, client: OpenAI) -> None:
    request: Any = chat(model="reference", logprobs=True, top_logprobs=3)
    done = client.chat.completions.create(**request)
    assert done.choices[0].logprobs is not None
    content = done.choices[0].logprobs.content
    assert content is not None
    assert done.usage is not None
    assert len(content) == done.usage.completion_tokens
    for token in content:
        assert token.bytes is not None
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0
    # The last one ends the answer and is not in its text.
    text = "".join(token.token for token in content[:-1])
    assert text == done.choices[0].message.content
    streamed = [
        token
        for chunk in client.chat.completions.create(**request, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for token in choice.logprobs.content or []
    ]
    assert streamed == content


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", 2.0),
        ("top_p", 0.3),
        ("top_k", 2),
        ("min_p", 0.5),
        ("repetition_penalty", 2.0),
        ("frequency_penalty", 1.5),
        ("presence_penalty", 1.5),
        ("logit_bias", {"65": 100}),
        ("seed", 5),
        ("min_tokens", 5),
        ("ignore_eos", True),
        ("stop_token_ids", [13]),
        ("stop", "e"),
        ("stop", ["x", "s"]),
    ],
)
def test_options_of_sampling_are_those_of_the_engine(
    server: ServerThread, option: str, value: Any
) -> None:
    """Each beside a temperature at which it matters; the same answer as in Python."""
    options = {"temperature": 1.5, "seed": 3, "max_tokens": 16, option: value}
    messages = [{"role": "user", "content": "Open Chat."}]
    done = server.post(CHAT, {"messages": messages, **options}).json()
    if option == "logit_bias":
        options[option] = {int(id): bias for id, bias in value.items()}
    own = server.engine.generate(messages=messages, **options)
    assert done["choices"][0]["message"]["content"] == own.text
    assert done["choices"][0]["finish_reason"] == own.finish_reason
    assert done["choices"][0]["stop_reason"] == own.stop_reason


def test_max_completion_tokens_is_the_newer_name(server: ServerThread) -> None:
    request = {"messages": ask("Open Chat."), "temperature": 0, **LONG}
    done = server.post(CHAT, {**request, "max_completion_tokens": 5, "max_tokens": 9}).json()
    assert done["usage"]["completion_tokens"] == 5
    assert done["choices"][0]["finish_reason"] == "length"


def test_what_the_template_knows_can_be_set(serve: Callable[..., ServerThread]) -> None:
    running = serve("{{ greeting }}{{ messages[0].content[0].text }}")
    for greeting in ("Hello ", "Good morning "):
        options = {"greeting": greeting}
        told = running.post(CHAT, chat(max_tokens=2, chat_template_kwargs=options)).json()
        expected = running.post("/tokenize", {"prompt": f"{greeting}Open Chat."}).json()
        assert told["usage"]["prompt_tokens"] == expected["count"]


def test_a_null_is_a_field_left_out(server: ServerThread) -> None:
    nulls = dict.fromkeys(("stop", "seed", "n", "tools", "top_p", "stream_options", "stream"))
    assert (
        server.post(CHAT, chat(**nulls)).json()["choices"]
        == (server.post(CHAT, chat()).json()["choices"])
    )


def test_harmless_fields_are_taken(server: ServerThread) -> None:
    fields = {"user": "someone", "metadata": {"run": "1"}, "store": False, "service_tier": "auto"}
    assert server.post(CHAT, chat(**fields)).status_code == 200


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"functions": []}, "functions"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [10**9]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "Hello"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages"),
        ({"timeout": -1}, "timeout"),
        ({"priority": 0.5}, "priority"),
    ],
)
def test_what_cannot_be_done_is_named(
    server: ServerThread, changes: dict[str, Any], name: str
) -> None:
    response = server.post(CHAT, chat(**changes))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert name in error["message"]


def test_a_stream_that_cannot_begin_has_a_status(server: ServerThread) -> None:
    for changes in ({"top_p": 0}, {"messages": ask("Look.", b"no image")}):
        response = server.post(CHAT, chat(stream=True, **changes))
        assert response.status_code == 400
        assert response.json()["error"]["message"]


def test_the_official_client_raises_its_own_errors(client: OpenAI) -> None:
    messages: Any = ask("Open Chat.")
    with pytest.raises(NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=messages)
    with pytest.raises(BadRequestError, match="top_p"):
        client.chat.completions.create(model="alias", messages=messages, top_p=3)


def test_a_prompt_that_cannot_fit_is_refused_with_the_numbers(server: ServerThread) -> None:
    messages = [{"role": "user", "content": "Open Chat. " * 3000}]
    response = server.post(CHAT, chat(messages=messages))
    assert response.status_code == 400
    assert "4096" in response.json()["error"]["message"]


def test_tool_calls_of_earlier_turns_must_be_json(server: ServerThread) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    messages = [*ask("Hello"), {"role": "assistant", "tool_calls": [call]}]
    response = server.post(CHAT, chat(messages=messages))
    assert response.status_code == 400
    assert "messages[1].tool_calls[0].function.arguments" in response.json()["error"]["message"]


def test_requests_leave_nothing_behind(server: ServerThread) -> None:
    server.wait_until_idle()
    assert json.loads(server.get("/v1/models").text)["data"][0]["id"] == "reference"
