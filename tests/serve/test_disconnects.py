"""Clients that leave, stall or come in crowds: what they asked for ends, others go on."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serve.requests import CHAT, LONG, ask, chat, png
from tests.serve.servers import ServerThread, wait_for

ENDLESS = {**LONG, "max_tokens": 3000}


def send(server: ServerThread, path: str, body: Any) -> socket.socket:
    """A request whose answer nobody has read yet."""
    connection = socket.socket()
    # Little fits between a server and a client that does not read.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server._listener.getsockname())
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/v1/generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_work_along(
    server: ServerThread, path: str, stream: bool
) -> None:
    options = {**LONG, "temperature": 0}
    body: dict[str, Any] = {
        CHAT: {**chat(**ENDLESS), "n": 2, "stream": stream},
        "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 3000, "stream": stream, **options},
        "/v1/responses": {"input": "a", "max_output_tokens": 3000, "stream": stream, **options},
        "/v1/generate": {"inputs": {"text": "a"}, "parameters": {"max_new_tokens": 3000, **LONG}},
    }[path]
    before = server.engine.stats()
    connection = send(server, path, body)
    wait_for(lambda: server.engine.stats().generation_tokens > before.generation_tokens + 5)
    connection.close()
    server.wait_until_idle()
    assert server.engine.stats().generation_tokens < before.generation_tokens + 2500
    wait_for(lambda: bool(server.records) and server.records[-1]["path"] == path)
    assert server.records[-1]["status"] == 499


def test_a_client_that_leaves_before_its_turn_is_never_computed(
    serve: Callable[..., ServerThread],
) -> None:
    running = serve(max_sequences=1, faults="decoder:20ms")
    first = send(running, CHAT, chat(**ENDLESS))
    wait_for(lambda: running.engine.stats().running == 1)
    prompts = running.engine.stats().prompt_tokens
    second = send(running, CHAT, chat(**ENDLESS))
    wait_for(lambda: running.engine.stats().waiting == 1)
    second.close()
    wait_for(lambda: running.engine.stats().waiting == 0)
    assert running.engine.stats().prompt_tokens == prompts
    first.close()
    running.wait_until_idle()


def test_a_reader_that_stalls_holds_up_nobody(server: ServerThread) -> None:
    """Its answer waits in the server, until it reads or leaves."""
    options = {"stream": True, "logprobs": True, "top_logprobs": 20}
    request = {**chat(**LONG), "max_tokens": 600, **options}
    stalled = send(server, CHAT, request)
    wait_for(lambda: server.engine.stats().running == 1)
    for _ in range(3):
        assert server.post(CHAT, chat()).status_code == 200
    wait_for(lambda: server.engine.stats().running == 0)  # computed to its end, though unread
    stalled.settimeout(60)
    received = b""
    while b"[DONE]" not in received[-100:]:
        received += stalled.recv(1 << 16)
    # What came while nobody read is in fewer, larger chunks, and none of it is lost.
    assert received.count(b'"top_logprobs"') == 600
    assert received.count(b"chat.completion.chunk") < 600
    stalled.close()
    server.wait_until_idle()


def test_a_full_queue_is_said_so_at_once(serve: Callable[..., ServerThread]) -> None:
    running = serve(max_sequences=1, max_queue=1, faults="decoder:20ms")
    connections = [send(running, CHAT, chat(**ENDLESS)) for _ in range(2)]
    wait_for(lambda: running.engine.stats().running + running.engine.stats().waiting == 2)
    for stream in (False, True):
        response = running.post(CHAT, chat(stream=stream))
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
    # A batch of which a part does not fit leaves nothing behind.
    assert running.post("/v1/completions", {"prompt": ["a", "b", "c"]}).status_code == 429
    for connection in connections:
        connection.close()
    running.wait_until_idle()
    assert running.post(CHAT, chat()).status_code == 200


def test_a_deadline_ends_the_work(serve: Callable[..., ServerThread]) -> None:
    running = serve(faults="decoder:20ms")
    response = running.post(CHAT, chat(**ENDLESS, timeout=0.3))
    assert response.status_code == 408
    assert "0.3" in response.json()["error"]["message"]
    events = running.events(CHAT, chat(**ENDLESS, timeout=0.3, stream=True))
    assert events[0]["choices"][0]["delta"]["content"]
    assert events[-1]["error"]["code"] == "timeout"
    assert "[DONE]" not in events
    running.wait_until_idle()


def test_a_lower_priority_number_goes_first(serve: Callable[..., ServerThread]) -> None:
    running = serve(max_sequences=1, faults="decoder:5ms")
    order: list[int] = []

    def request(priority: int) -> None:
        assert running.post(CHAT, chat(priority=priority)).status_code == 200
        order.append(priority)

    first = send(running, CHAT, chat(**ENDLESS))
    wait_for(lambda: running.engine.stats().running == 1)
    threads = []
    for waiting, priority in enumerate((5, 0), 1):
        threads.append(threading.Thread(target=request, args=(priority,)))
        threads[-1].start()
        wait_for(lambda waiting=waiting: running.engine.stats().waiting == waiting)  # type: ignore[misc]
    first.close()
    for thread in threads:
        thread.join()
    assert order == [0, 5]


def test_a_crowd_gets_the_answers_that_each_gets_alone(server: ServerThread) -> None:
    requests = [
        chat(messages=ask("Open Chat.", png(84, 112 + 14 * place, seed=place)), **LONG)
        for place in range(12)
    ]

    def answer(request: dict[str, Any]) -> str:
        done = server.post(CHAT, request).json()
        return done["choices"][0]["message"]["content"]

    alone = [answer(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as crowd:
        together = list(crowd.map(answer, requests))
    assert together == alone
    assert len(set(alone)) > 1
    server.wait_until_idle()


def test_failed_steps_end_as_errors_and_turn_readiness_off(
    serve: Callable[..., ServerThread],
) -> None:
    running = serve(faults="decoder:error")
    for _ in range(8):
        response = running.post(CHAT, chat())
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
    wait_for(lambda: running.get("/ready").status_code == 503)
    assert running.get("/ready").json()["error"]["code"] == "unhealthy"
    assert running.get("/health").status_code == 200
    assert "glmcompile:failed_steps_total" in running.get("/metrics").text


def test_a_server_that_stops_finishes_first(serve: Callable[..., ServerThread]) -> None:
    running = serve(faults="decoder:20ms")
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(running.post, CHAT, chat(max_tokens=20, **LONG))
        streamed = pool.submit(running.events, CHAT, chat(max_tokens=20, stream=True, **LONG))
        wait_for(lambda: running.engine.stats().running == 2)
        client = httpx.Client(base_url=running.url)
        assert client.get("/ready").status_code == 200
        running.stop()
        wait_for(lambda: client.get("/ready").status_code == 503)
        refused = client.post(CHAT, json=chat())
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert client.get("/health").status_code == 200
        assert whole.result().json()["usage"]["completion_tokens"] == 20
        assert streamed.result()[-1] == "[DONE]"


def test_what_outlasts_the_grace_ends_with_an_error(serve: Callable[..., ServerThread]) -> None:
    running = serve(faults="decoder:20ms", grace=0.2)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(running.post, CHAT, chat(**ENDLESS))
        streamed = pool.submit(running.events, CHAT, chat(**ENDLESS, stream=True))
        wait_for(lambda: running.engine.stats().running == 2)
        running.stop()
        assert whole.result().status_code == 503
        assert streamed.result()[-1]["error"]["code"] == "unavailable"
