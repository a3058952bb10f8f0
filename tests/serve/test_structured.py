"""Answers that must have a form: response_format, structured_outputs, tools, reasoning."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.requests import CHAT, chat
from tests.serve.servers import ServerThread

TAP = r'do\(action="Tap", element=\[[0-9]{1,3},[0-9]{1,3}\]\)'
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["x"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}


def text(server: ServerThread, **options: Any) -> str:
    """The answer of a model that draws freely, so that only its form can be right."""
    request = chat(temperature=2.0, seed=1, max_tokens=60, **options)
    response = server.post(CHAT, request)
    assert response.status_code == 200, response.text
    whole = response.json()["choices"][0]["message"]["content"]
    pieces = server.events(CHAT, {**request, "stream": True})[:-1]
    assert whole == "".join(
        piece["choices"][0]["delta"].get("content", "") for piece in pieces if piece["choices"]
    )
    return whole


def is_point(answer: str) -> bool:
    point = json.loads(answer)
    return list(point) == ["x"] and 0 <= point["x"] <= 99


def test_an_answer_follows_its_schema(server: ServerThread) -> None:
    assert is_point(text(server, response_format=SCHEMA))
    assert is_point(text(server, structured_outputs={"json": POINT}))
    assert is_point(text(server, structured_outputs={"json": json.dumps(POINT)}))


def test_an_answer_follows_a_regex_a_choice_or_a_grammar(server: ServerThread) -> None:
    assert re.fullmatch(TAP, text(server, structured_outputs={"regex": TAP}))
    assert text(server, structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    grammar = 'root ::= "a" ("b" | "c") "d"'
    assert text(server, structured_outputs={"grammar": grammar}) in ("abd", "acd")


def test_a_json_object_begins_as_one(server: ServerThread) -> None:
    for option in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        assert text(server, **option).startswith("{")
    assert not text(server, response_format={"type": "text"}).startswith("{")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {**SCHEMA, "json_schema": {"schema": {"type": "no"}}}}, "schema"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"structured_outputs": {"regex": "a" * 100_000}}, "bytes"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "grammar"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"structured_outputs": {"regex": "a"}, "response_format": SCHEMA}, "exclude"),
        ({"guided_json": POINT}, "structured_outputs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_forms_that_cannot_be_had_are_named(
    server: ServerThread, options: dict[str, Any], name: str
) -> None:
    response = server.post(CHAT, chat(**options))
    assert response.status_code == 400, response.text
    assert name in response.json()["error"]["message"]


# As Hermes writes it; the tokenizer has no tokens for the markers.
TOOLS = """{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor %}{% endfor %}{{ tools | tojson }}assistant:"""
THINKS = "{{ messages[0].content[0].text }}{# <think> </think> #}{{ opening }}"

TAP_TOOL = {
    "type": "function",
    "function": {
        "name": "tap",
        "parameters": {"type": "object", "properties": POINT["properties"], "required": ["x"],
                       "additionalProperties": False},
    },
}  # fmt: skip
BACK_TOOL = {"type": "function", "function": {"name": "back"}}


@pytest.fixture
def with_tools(serve: Callable[..., ServerThread]) -> ServerThread:
    return serve(TOOLS)


def test_a_call_that_is_required_is_made(with_tools: ServerThread) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "tap"}}):
        request: Any = chat(
            model="model",
            tools=[TAP_TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=2.0,
            seed=1,
            max_tokens=80,
        )
        choices = with_tools.openai.chat.completions.create(**request).choices
        assert choices[0].finish_reason == "tool_calls"
        assert choices[0].message.content is None
        calls = choices[0].message.tool_calls
        assert calls is not None
        for call in calls:
            assert call.type == "function"
            assert call.function.name == "tap"
            assert is_point(call.function.arguments)
        pieces = list(with_tools.openai.chat.completions.create(**request, stream=True))
        streamed = [call for piece in pieces for call in piece.choices[0].delta.tool_calls or []]
        assert [call.function.arguments for call in streamed if call.function] == [
            call.function.arguments for call in calls if call.type == "function"
        ]
        assert [call.index for call in streamed] == list(range(len(calls)))
        assert pieces[-1].choices[0].finish_reason == "tool_calls"


def test_an_answer_without_a_call_is_text(with_tools: ServerThread) -> None:
    done = with_tools.post(CHAT, chat(tools=[TAP_TOOL, BACK_TOOL])).json()["choices"][0]
    assert done["message"]["tool_calls"] is None
    assert done["message"]["content"]
    assert done["finish_reason"] != "tool_calls"


def test_calls_of_earlier_turns_and_tools_are_part_of_the_prompt(with_tools: ServerThread) -> None:
    def tokens(**options: Any) -> int:
        request = chat(max_tokens=1, **options)
        return with_tools.post(CHAT, request).json()["usage"]["prompt_tokens"]

    function = {"name": "tap", "arguments": '{"x": 3}'}
    turns = [
        {"role": "user", "content": "Open Chat."},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": function}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]  # fmt: skip
    assert tokens(messages=turns) > tokens(messages=turns[:1])
    assert tokens(tools=[TAP_TOOL]) > tokens()
    assert tokens(tools=[TAP_TOOL], tool_choice="none") == tokens()


def test_responses_give_calls_as_items(with_tools: ServerThread) -> None:
    tool = {"type": "function", **TAP_TOOL["function"]}  # type: ignore[dict-item]
    request: Any = {
        "model": "model",
        "input": "Open Chat.",
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
    }
    whole = with_tools.openai.responses.create(**request)
    (call,) = whole.output
    assert call.type == "function_call"
    assert call.name == "tap"
    assert is_point(call.arguments)
    with with_tools.openai.responses.stream(**request) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    assert "response.function_call_arguments.done" in kinds
    assert kinds[-1] == "response.completed"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [TAP_TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": [TAP_TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [TAP_TOOL], "response_format": SCHEMA}, "tool_choice"),
        ({"tools": [TAP_TOOL], "tool_choice": "required", "response_format": SCHEMA}, "exclude"),
    ],
)
def test_tools_that_cannot_be_had_are_named(
    with_tools: ServerThread, options: dict[str, Any], name: str
) -> None:
    response = with_tools.post(CHAT, chat(**options))
    assert response.status_code == 400, response.text
    assert name in response.json()["error"]["message"]


def test_thinking_is_given_apart_where_it_is_wanted(serve: Callable[..., ServerThread]) -> None:
    """A grammar lays the model's thinking into its mouth, markers included."""
    running = serve(THINKS)
    answer = "<think>\nLet me see.\n</think>\n\nTap it."
    request: Any = chat(structured_outputs={"choice": [answer]}, max_tokens=60)
    message = running.post(CHAT, request).json()["choices"][0]["message"]
    assert message["content"] == answer
    assert message["reasoning_content"] is None


def test_a_form_begins_after_the_thinking(serve: Callable[..., ServerThread]) -> None:
    """The prompt opens the thinking; a stop string is what ends this model's."""
    running = serve(THINKS)
    options = {"chat_template_kwargs": {"opening": "<think>"}, "include_reasoning": True}
    form = {"structured_outputs": {"choice": ["yes", "no"]}}
    whole = running.post(CHAT, chat(**options, **form)).json()
    thinking, usage = whole["choices"][0], whole["usage"]
    assert thinking["message"]["reasoning_content"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] > 0
    assert thinking["message"]["content"] == ""
    assert thinking["finish_reason"] == "length"
    dropped = chat(**{**options, "include_reasoning": False}, **form)
    message = running.post(CHAT, dropped).json()["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"] is None
    counted = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last, _ = running.events(CHAT, chat(**options, **form, **counted))
    assert last["usage"]["completion_tokens_details"] == usage["completion_tokens_details"]
    streamed = [piece["choices"][0]["delta"].get("reasoning_content", "") for piece in pieces]
    assert "".join(streamed) == thinking["message"]["reasoning_content"]
    assert len(streamed) > 3


def test_a_form_need_not_wait_for_thinking(serve: Callable[..., ServerThread]) -> None:
    running = serve(THINKS, split_reasoning=True)
    form = {"structured_outputs": {"choice": ["yes", "no"]}}
    message = running.post(CHAT, chat(**form)).json()["choices"][0]["message"]
    assert message["content"] in ("yes", "no")
    assert message["reasoning_content"] is None
