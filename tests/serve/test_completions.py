"""`/v1/completions` in its legacy form."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.requests import LONG
from tests.serve.servers import ServerThread

PATH = "/v1/completions"


def body(**options: Any) -> dict[str, Any]:
    return {"prompt": "Open Chat.", "temperature": 0, "max_tokens": 6, **LONG, **options}


def test_a_prompt_is_continued_as_the_engine_does(server: ServerThread) -> None:
    own = server.engine.generate(text="Open Chat.", max_tokens=6, **LONG)
    done = server.openai.completions.create(
        model="reference", prompt="Open Chat.", temperature=0, max_tokens=6, extra_body=LONG
    )
    assert done.choices[0].text == own.text
    assert done.choices[0].finish_reason == "length"
    assert done.object == "text_completion"
    assert done.usage is not None
    assert done.usage.completion_tokens == 6


def test_prompts_come_as_texts_or_tokens_one_or_many(server: ServerThread) -> None:
    texts = ["Open", "Chat now"]
    tokens = [server.post("/tokenize", {"prompt": text}).json()["tokens"] for text in texts]
    single = [
        server.post(PATH, body(prompt=prompt)).json()["choices"][0]["text"]
        for prompt in (*texts, *tokens)
    ]
    assert single[:2] == single[2:]
    for prompts in (texts, tokens):
        done = server.post(PATH, body(prompt=prompts, n=2)).json()
        assert [choice["index"] for choice in done["choices"]] == [0, 1, 2, 3]
        assert [choice["text"] for choice in done["choices"]] == [
            single[0], single[0], single[1], single[1],
        ]  # fmt: skip
        assert done["usage"]["prompt_tokens"] == sum(map(len, tokens))
        assert done["usage"]["completion_tokens"] == 4 * 6


def test_echo_puts_the_prompt_before_the_answer(server: ServerThread) -> None:
    plain = server.post(PATH, body()).json()["choices"][0]["text"]
    tokens = server.post("/tokenize", {"prompt": "Open Chat."}).json()["tokens"]
    for prompt in ("Open Chat.", tokens):
        done = server.post(PATH, body(prompt=prompt, echo=True)).json()
        assert done["choices"][0]["text"] == "Open Chat." + plain


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_is_the_same_in_pieces(server: ServerThread, echo: bool) -> None:
    request = body(prompt=["Open", "Chat"], echo=echo)
    whole = server.post(PATH, request).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last, done = server.events(PATH, {**request, **options})
    texts = ["", ""]
    for piece in pieces:
        for choice in piece["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert done == "[DONE]"


def test_logprobs_have_the_legacy_shape(server: ServerThread) -> None:
    done = server.post(PATH, body(logprobs=2)).json()["choices"][0]
    logprobs = done["logprobs"]
    assert "".join(logprobs["tokens"]) == done["text"]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 6
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert done["text"][offset:].startswith(token)
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    pieces = server.events(PATH, body(logprobs=2, stream=True))[:-1]
    assert [
        token for piece in pieces for token in piece["choices"][0]["logprobs"]["tokens"]
    ] == logprobs["tokens"]


def test_an_answer_is_sixteen_tokens_long_unless_told(server: ServerThread) -> None:
    request = body()
    del request["max_tokens"]
    assert server.post(PATH, request).json()["usage"]["completion_tokens"] == 16


def test_control_tokens_in_a_prompt_are_tokens(server: ServerThread) -> None:
    text = "<|user|>\nOpen Chat.<|assistant|>\n"
    tokens = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert tokens["token_strs"].count("<|user|>") == 1
    done = server.post(PATH, body(prompt=text)).json()
    assert done["usage"]["prompt_tokens"] == tokens["count"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": ["x"] * 100, "n": 2}, "n=2"),
        ({"prompt": [10**6]}, "1000000"),
        ({"prompt": [-1]}, "-1"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_cannot_be_done_is_named(
    server: ServerThread, changes: dict[str, Any], name: str
) -> None:
    response = server.post(PATH, body(**changes))
    assert response.status_code == 400, response.text
    assert name in response.json()["error"]["message"]
