"""`/v1/responses` in its stateless form, through the official client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.serve.requests import CHAT, LONG, SCREEN, ask, chat, data_url
from tests.serve.servers import ServerThread

PATH = "/v1/responses"


def test_text_and_items_are_answered_as_the_same_chat_is(server: ServerThread) -> None:
    client = server.openai
    expected = server.post(CHAT, chat(messages=ask("Open Chat."))).json()
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Open Chat."}]}]
    for given in ("Open Chat.", [{"role": "user", "content": "Open Chat."}], parts):
        done = client.responses.create(
            model="reference", input=given, temperature=0, max_output_tokens=24
        )
        assert done.output_text == expected["choices"][0]["message"]["content"]
        assert done.status == "completed"
        assert done.usage is not None
        assert done.usage.total_tokens == expected["usage"]["total_tokens"]


def test_instructions_images_and_earlier_turns_reach_the_model(server: ServerThread) -> None:
    messages = [
        {"role": "system", "content": "Answer."},
        *ask("One?"),
        {"role": "assistant", "content": "do()"},
        *ask("Open Chat.", SCREEN.read_bytes()),
    ]
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "One?"}]},
        {"type": "reasoning", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "do()"}]},
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": data_url(SCREEN.read_bytes())},
                {"type": "input_text", "text": "Open Chat."},
            ],
        },
    ]
    messages[2]["content"] = [{"type": "text", "text": "do()"}]
    expected = server.post(CHAT, chat(messages=messages)).json()
    done = server.openai.responses.create(
        model="reference", instructions="Answer.", input=items, temperature=0, max_output_tokens=24
    )
    assert done.output_text == expected["choices"][0]["message"]["content"]
    assert done.usage is not None
    assert done.usage.input_tokens == expected["usage"]["prompt_tokens"]


def test_a_stream_of_typed_events_builds_the_same_answer(server: ServerThread) -> None:
    request: Any = {"model": "reference", "input": "Open Chat.", "temperature": 0}
    whole = server.openai.responses.create(**request)
    with server.openai.responses.stream(**request) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text != ""
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(events)))


def test_an_answer_that_is_cut_is_incomplete(server: ServerThread) -> None:
    request = {"input": "Open Chat.", "temperature": 0, "max_output_tokens": 3, **LONG}
    done = server.post(PATH, request).json()
    assert done["status"] == "incomplete"
    assert done["incomplete_details"] == {"reason": "max_output_tokens"}
    assert server.events(PATH, {**request, "stream": True})[-1]["type"] == "response.incomplete"


def test_text_can_be_given_a_schema(server: ServerThread) -> None:
    schema = {"enum": [{"x": 1}, {"x": 2}]}
    format = {"type": "json_schema", "name": "answer", "schema": schema}
    done = server.post(PATH, {"input": "Open Chat.", "text": {"format": format}}).json()
    text = done["output"][0]["content"][0]["text"]
    assert json.loads(text) in schema["enum"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "content[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"text": {"format": {"type": "json_schema"}}}, "schema"),
    ],
)
def test_what_needs_a_store_or_is_unknown_is_refused(
    server: ServerThread, changes: dict[str, Any], name: str
) -> None:
    response = server.post(PATH, {"input": "Open Chat.", **changes})
    assert response.status_code == 400, response.text
    assert name in response.json()["error"]["message"]
