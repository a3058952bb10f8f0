"""Requests that nobody wrote: whatever comes is answered, in the form that was promised."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmcompile.serve.protocol.chat import ChatRequest
from tests.serve.requests import CHAT, chat, data_url, png
from tests.serve.servers import ServerThread

# The engine is quick, but not every one of these is refused.
BOUNDED = {"max_tokens": 3, "temperature": 0}
FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [name for name in ChatRequest.model_fields if name not in ("max_completion_tokens", "n")]
)
PART = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["text", "image_url", "image", "video"]) | JSON,
        "text": st.text(max_size=20) | JSON,
        "image_url": st.fixed_dictionaries({"url": st.text(max_size=20)}) | JSON,
        "image": JSON,
        "path": st.just("/etc/passwd"),
    },
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "system", "assistant", "tool"]) | JSON,
        "content": st.text(max_size=20) | st.lists(PART, max_size=3) | JSON,
        "tool_calls": JSON,
    },
)


def check(response: httpx.Response) -> None:
    """Answered, or refused in OpenAI's form; a server's own failure is neither."""
    assert response.status_code in (200, 400, 408), (response.request.content, response.text)
    assert response.headers["x-request-id"]
    if response.status_code != 200:
        assert response.json()["error"]["message"]
        assert "Traceback" not in response.text


def send(server: ServerThread, body: Any) -> httpx.Response:
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    return server.post(CHAT, content=content, headers={"content-type": "application/json"})


@FEW
@given(changes=st.dictionaries(FIELDS, JSON, max_size=3))
def test_fields_of_any_value(server: ServerThread, changes: dict[str, Any]) -> None:
    check(send(server, {**chat(**BOUNDED), **changes}))


@FEW
@given(messages=st.lists(MESSAGE, max_size=3) | JSON)
def test_messages_of_any_form(server: ServerThread, messages: Any) -> None:
    check(send(server, chat(messages=messages, **BOUNDED)))


@FEW
@given(place=st.integers(0, 400), bytes=st.binary(min_size=1, max_size=8), cut=st.booleans())
def test_images_with_any_damage(server: ServerThread, place: int, bytes: bytes, cut: bool) -> None:
    image = png(56, 56)
    place %= len(image)
    image = image[:place] + bytes + (b"" if cut else image[place + len(bytes) :])
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
    check(send(server, chat(messages=[{"role": "user", "content": parts}], **BOUNDED)))


@FEW
@given(content=st.binary(max_size=60))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/v1/generate", "/tokenize"])
def test_bodies_of_any_bytes(server: ServerThread, path: str, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    check(server.post(path, content=content, headers=headers))


def test_everything_that_the_schema_allows(server: ServerThread) -> None:
    """Schemathesis on the server's own description: every route, bounded examples of each."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        tried.add(operation.path)

        @settings(FEW, max_examples=15)
        @given(case=operation.as_strategy())
        def any_request(case: Any) -> None:
            body = case.body
            if isinstance(body, dict) and "inputs" not in body:
                case.body = {**body, **_bounds(case.path)}
            response = case.call(base_url=server.url, timeout=60)
            assert response.status_code in (200, 400, 404, 408), (case.body, response.text)
            if response.status_code == 200 and not isinstance(body, dict):
                case.validate_response(response, checks=[schema_conformance])

        any_request()
    assert {CHAT, "/v1/responses", "/v1/completions", "/v1/generate", "/tokenize"} <= tried


def _bounds(path: str) -> dict[str, Any]:
    """What keeps an example's answer short."""
    if path == "/v1/responses":
        return {"max_output_tokens": 2}
    return {"max_tokens": 2, "n": 1} if "completions" in path else {}


def schema_conformance(*arguments: Any) -> Any:
    return schemathesis.checks.response_schema_conformance(*arguments)  # type: ignore[attr-defined]


def test_the_description_names_every_route(server: ServerThread) -> None:
    described = server.get("/openapi.json").json()
    assert described["info"]["title"] == "glmcompile"
    request = described["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]
    assert request["schema"]["$ref"].endswith("ChatRequest")
    for status in ("400", "401", "413", "429", "503"):
        assert status in described["paths"][CHAT]["post"]["responses"]
