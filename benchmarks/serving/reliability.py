"""How many well-formed requests succeed, without faults and with one step in fifty failing."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

from images import part, questions
from server import Server, served

import glmcompile

CLIENTS = 16
QUESTIONS = 64
FAULTS = "decoder:error@0.02"


def measure(engine: Path, requests: int) -> dict[str, Any]:
    """Every answer is compared with the one given alone; clients do not retry.

    Among the requests are some that no server could serve, and clients that hang up; neither is
    counted as well-formed, and neither may disturb the others.
    """
    asked = [body(image, prompt) for image, prompt in questions(QUESTIONS, seed=77)]
    with glmcompile.load(engine) as loaded:
        expected = [
            loaded.generate(messages=each["messages"], max_tokens=each["max_tokens"]).text
            for each in asked
        ]
    result: dict[str, Any] = {"requests": requests, "clients": CLIENTS, "faults": FAULTS}
    for name, options in (("without_faults", ()), ("with_faults", ("--fault", FAULTS))):
        with served(engine, *options) as server:
            result[name] = run(server, asked, expected, requests)
    for name in ("without_faults", "with_faults"):
        result[f"success_{name}"] = result[name]["right"] / requests
    return result


def body(image: bytes, prompt: str) -> dict[str, Any]:
    content = [part(image), {"type": "text", "text": prompt}]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 24,
        "temperature": 0,
    }


def run(
    server: Server, asked: list[dict[str, Any]], expected: list[str], requests: int
) -> dict[str, Any]:
    counts = {"right": 0, "wrong": 0, "refused": 0, "failed": 0, "hung_up": 0, "malformed": 0}
    lock, numbers = threading.Lock(), itertools.count()
    encoded = [json.dumps(each).encode() for each in asked]

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while (number := next(numbers)) < requests:
            if rng.random() < 0.03:
                hang_up(server, encoded[number % len(encoded)])
                tell("hung_up")
            if rng.random() < 0.03:
                status, _ = server.post("/v1/chat/completions", rng.choice(MALFORMED))
                tell("malformed" if 400 <= status < 500 else "wrong")
            place = number % len(encoded)
            try:
                status, answer = server.post("/v1/chat/completions", encoded[place])
            except OSError:
                tell("failed")
                continue
            if status == 200:
                text = answer["choices"][0]["message"]["content"]
                tell("right" if text == expected[place] else "wrong")
            else:
                tell("refused" if status in (429, 503) else "failed")

    def tell(what: str) -> None:
        with lock:
            counts[what] += 1

    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    return {
        **counts,
        "seconds": seconds,
        "left_running": int(server.metric("vllm:num_requests_running")),
        "left_waiting": int(server.metric("vllm:num_requests_waiting")),
        "left_kv_usage": server.metric("vllm:kv_cache_usage_perc"),
    }


MALFORMED = (
    b"{",
    b"[]",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    b'{"url": "data:image/png;base64,iVBORw0KGgo="}}]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    b'{"url": "/etc/passwd"}}]}]}',
)


def hang_up(server: Server, encoded: bytes) -> None:
    """Ask for a stream and leave after its first bytes."""
    connection = server.connect()
    try:
        wanted = json.dumps({**json.loads(encoded), "stream": True, "max_tokens": 200}).encode()
        connection.request(
            "POST", "/v1/chat/completions", wanted, {"Content-Type": "application/json"}
        )
        connection.getresponse().read1(16)
    except OSError:
        pass
    finally:
        connection.close()
