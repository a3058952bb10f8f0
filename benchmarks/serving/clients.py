"""Sixteen clients at once, one client, and the engine called in Python with the same requests."""

from __future__ import annotations

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from images import part, questions
from server import Server, served

import glmcompile

CLIENTS = 16
ANSWER_TOKENS = 48


def measure(engine: Path, repetitions: int) -> dict[str, Any]:
    """Throughputs in requests per second, in turns, each repetition with images of its own."""
    figures: dict[str, list[float]] = {"python_16": [], "clients_16": [], "clients_1": []}
    identical = True
    with served(engine) as server, glmcompile.load(engine) as loaded:
        run(server, loaded, seed=1000)  # warm-up
        for repetition in range(repetitions):
            result = run(server, loaded, seed=repetition)
            identical &= result.pop("identical")
            for name, value in result.items():
                figures[name].append(value)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {
        "clients": CLIENTS,
        "answer_tokens": ANSWER_TOKENS,
        "repetitions": repetitions,
        "requests_per_s": {name: round(value, 3) for name, value in medians.items()},
        "clients_16_over_1": medians["clients_16"] / medians["clients_1"],
        "clients_16_over_python": medians["clients_16"] / medians["python_16"],
        "identical_answers": identical,
    }


def run(server: Server, engine: Any, seed: int) -> dict[str, Any]:
    """Three sets of images, so that no run finds another's features in a cache."""
    alone_set, together_set, python_set = (
        messages(questions(CLIENTS, 3 * seed + place)) for place in range(3)
    )
    bodies = [body(each) for each in alone_set]
    began = time.perf_counter()
    for each in bodies:
        ask(server, each)
    one = CLIENTS / (time.perf_counter() - began)

    bodies = [body(each) for each in together_set]
    with ThreadPoolExecutor(CLIENTS) as pool:
        began = time.perf_counter()
        together = list(pool.map(lambda each: ask(server, each), bodies))
        many = CLIENTS / (time.perf_counter() - began)

    requests = [
        {"messages": each, "max_tokens": ANSWER_TOKENS, "ignore_eos": True} for each in python_set
    ]
    began = time.perf_counter()
    engine.generate_many(requests)
    python = CLIENTS / (time.perf_counter() - began)

    # Not timed: the same questions alone, of an engine that remembers nothing of them.
    engine.clear_caches()
    alone = [
        engine.generate(messages=each, max_tokens=ANSWER_TOKENS, ignore_eos=True).text
        for each in together_set
    ]
    engine.clear_caches()
    return {
        "python_16": python,
        "clients_16": many,
        "clients_1": one,
        "identical": together == alone,
    }


def messages(asked: list[tuple[bytes, str]]) -> list[list[dict[str, Any]]]:
    return [
        [{"role": "user", "content": [part(image), {"type": "text", "text": prompt}]}]
        for image, prompt in asked
    ]


def body(conversation: list[dict[str, Any]]) -> bytes:
    return json.dumps(
        {
            "messages": conversation,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
    ).encode()


def ask(server: Server, request: bytes) -> str:
    status, answer = server.post("/v1/chat/completions", request)
    if status != 200:
        raise RuntimeError(f"status {status}: {answer}")
    return answer["choices"][0]["message"]["content"]
