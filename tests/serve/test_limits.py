"""What strangers may not do: keys, sizes, types, depths, files, and errors that tell too much."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.serve.requests import CHAT, ask, chat, png
from tests.serve.servers import ServerThread

JSON = {"content-type": "application/json"}


@pytest.fixture
def guarded(serve: Callable[..., ServerThread]) -> ServerThread:
    """A server with a key, small limits and one friendly origin."""
    friends = ("https://friend.example",)
    return serve(api_key="the key", max_body=1 << 16, cors_origins=friends)


def test_without_the_key_nothing_is_computed_or_told(guarded: ServerThread) -> None:
    paths = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/generate")
    for path in (*paths, "/tokenize", "/detokenize"):
        assert guarded.post(path, chat()).status_code == 401
    for path in ("/v1/models", "/v1/models/model", "/openapi.json", "/nowhere"):
        assert guarded.get(path).status_code == 401
    for key in ("the ke", "the keyy", "Bearer the key", "ключ"):
        headers = {"authorization": f"Bearer {key}".encode()}
        response = guarded.post(CHAT, chat(), headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_with_the_key_all_is_as_usual(guarded: ServerThread) -> None:
    headers = {"authorization": "Bearer the key"}
    assert guarded.post(CHAT, chat(max_tokens=1), headers=headers).status_code == 200
    assert guarded.get("/v1/models", headers=headers).status_code == 200


def test_those_that_watch_over_the_server_need_no_key(guarded: ServerThread) -> None:
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert guarded.get(path).status_code == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_there(guarded: ServerThread) -> None:
    """By its announced length, and without one as soon as it has grown too large."""
    with socket.create_connection(guarded._listener.getsockname()) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer the key\r\n"
            b"content-type: application/json\r\ncontent-length: 100000000\r\n\r\n"
        )
        assert b" 413 " in connection.recv(100)
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while sent < 1 << 26:
            sent += 1 << 12
            yield b" " * (1 << 12)

    headers = {**JSON, "authorization": "Bearer the key"}
    try:
        response = httpx.post(f"{guarded.url}{CHAT}", content=endless(), headers=headers)
    except httpx.TransportError:
        pass  # the server closed the connection while this was still sending
    else:
        assert response.status_code == 413
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert sent < 1 << 26


def test_pages_of_friendly_origins_alone_may_call(
    guarded: ServerThread, server: ServerThread
) -> None:
    def preflight(running: ServerThread, origin: str) -> httpx.Response:
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type, authorization",
        }
        return httpx.options(f"{running.url}{CHAT}", headers=headers)

    friend = preflight(guarded, "https://friend.example")
    assert friend.headers["access-control-allow-origin"] == "https://friend.example"
    assert "access-control-allow-origin" not in preflight(guarded, "https://other").headers
    assert "access-control-allow-origin" not in preflight(server, "https://friend.example").headers


def test_without_a_key_other_pages_are_refused(
    server: ServerThread, serve: Callable[..., ServerThread]
) -> None:
    own = server.url.removeprefix("http://")
    port = own.partition(":")[2]

    def status(running: ServerThread, origin: str, host: str) -> int:
        headers = {"origin": origin, "host": host}
        return running.post("/tokenize", {"prompt": "a"}, headers=headers).status_code

    assert status(server, server.url, own) == 200
    assert status(server, f"http://localhost:{port}", f"LOCALHOST:{port}") == 200
    assert status(server, f"http://[::1]:{port}", f"[::1]:{port}") == 200
    refused = (
        ("http://evil.example", own),  # a page that sends without asking
        (f"http://evil.example:{port}", f"evil.example:{port}"),  # DNS rebinding
        ("http://127.0.0.1:1", own),
        ("null", own),
        ("http://[", "["),
        ("", ""),
    )
    for origin, host in refused:
        assert status(server, origin, host) == 403, (origin, host)
    friendly = serve(cors_origins=("https://friend.example",))
    assert status(friendly, "https://friend.example", own) == 200
    assert status(friendly, "https://other.example", own) == 403


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_json_must_be_called_json(server: ServerThread, kind: str) -> None:
    """A page of another origin can send the other types without asking first."""
    content = json.dumps(chat()).encode()
    response = server.post(CHAT, content=content, headers={"content-type": kind})
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 1}',
        b"[" * 100_000,
        b'{"messages":' * 100_000,
        b'{"messages": [{"role": "user", "content": ' + b"[" * 150 + b"]" * 150 + b"}]}",
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_bodies_that_are_no_requests_are_refused(server: ServerThread, content: bytes) -> None:
    for path in (CHAT, "/v1/completions", "/v1/responses", "/v1/generate", "/tokenize"):
        response = server.post(path, content=content, headers=JSON)
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["message"]


def test_paths_and_methods_that_are_not_there(server: ServerThread) -> None:
    for response, status in (
        (server.get("/v2/nothing"), 404),
        (server.get(CHAT), 405),
        (server.post("/v1/models", {}), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "calibration/screenshot.png",
        "file:///etc/passwd",
        "https://127.0.0.1/screen.png",
        "http://169.254.169.254/latest/meta-data",
        "ftp://example.com/screen.png",
        "data:image/png;base64,",
        "data:image/png;base64,AAAA",
        "data:text/html,<b>",
        "",
    ],
)
def test_images_come_from_the_request_alone(server: ServerThread, url: str) -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    response = server.post(CHAT, chat(messages=messages))
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "messages[0].content[0]" in message
    assert "root" not in message


def test_too_many_images_are_refused(server: ServerThread) -> None:
    response = server.post(CHAT, chat(messages=ask("Look.", *[png(28, 28)] * 11)))
    assert response.status_code == 400
    assert "10" in response.json()["error"]["message"]


def test_a_request_can_ask_for_smaller_images(server: ServerThread) -> None:
    messages = ask("Look.", png(280, 280))
    usual = server.post(CHAT, chat(messages=messages)).json()["usage"]["prompt_tokens"]
    bound = {"max_pixels": 112 * 112}
    smaller = server.post(CHAT, chat(messages=messages, mm_processor_kwargs=bound)).json()
    assert smaller["usage"]["prompt_tokens"] < usual


def test_a_request_keeps_its_id(server: ServerThread) -> None:
    given = server.post(CHAT, chat(), headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    assert given.json()["id"] == "chatcmpl-abc-1"
    for bad in ("", "two words", "x" * 200):
        made = server.get("/health", headers={"x-request-id": bad.encode()})
        assert len(made.headers["x-request-id"]) == 32
    assert server.get("/nowhere", headers={"x-request-id": "abc-2"}).headers["x-request-id"] == (
        "abc-2"
    )


def test_what_nobody_expected_is_told_to_the_log_alone(
    serve: Callable[..., ServerThread], caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(faults="tokenizer:error")
    response = running.post(CHAT, chat(), headers={"x-request-id": "the-one"})
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "server_error"
    assert "the-one" in error["message"]
    assert "fault" not in response.text
    assert "Traceback" not in response.text
    assert "the-one" in caplog.text
    assert "a fault injected into the tokenizer" in caplog.text


def test_a_client_that_speaks_no_http_does_no_harm(server: ServerThread) -> None:
    with socket.create_connection(server._listener.getsockname()) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert b"400" in connection.recv(100)
    plain = http.client.HTTPConnection(*server._listener.getsockname())
    plain.request("GET", "/health")
    assert plain.getresponse().status == 200
