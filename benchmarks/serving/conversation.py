"""An agent's conversation on the 0.6-billion model: what later steps compute and how long it takes.

Open-AutoGLM drops the screenshots of earlier steps and appends the model's answer, so what a step
can reuse ends at the first user turn: the system prompt. The same screenshot sent again, as after
an action without effect, needs no encoder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from images import part, screenshot
from server import Server, served, stream

STEPS = 4
# About 600 tokens, in the manner of an agent's instructions.
SYSTEM = (Path(__file__).resolve().parent / "system_prompt.txt").read_text(encoding="utf-8")


def measure(engine: Path) -> dict[str, Any]:
    """Times, reused tokens and encoder runs of each step, then of the last screenshot again."""
    with served(engine) as server:
        warm_up(server)
        conversation: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        steps = []
        for number in range(STEPS):
            content = [part(screenshot(number)), {"type": "text", "text": f"Step {number}."}]
            conversation.append({"role": "user", "content": content})
            steps.append(step(server, conversation))
            if number < STEPS - 1:
                conversation[-1] = {"role": "user", "content": [content[1]]}
                action = f'do(action="Tap", element=[{100 + number},500])'
                conversation.append({"role": "assistant", "content": action})
        asked_again = [content[0], {"type": "text", "text": "Again."}]
        again = [*conversation[:-1], {"role": "user", "content": asked_again}]
        resent = step(server, again)
    reused = min(one["cached_tokens"] for one in steps[1:])
    return {
        "system_tokens": steps[0]["system_tokens"],
        "steps": steps,
        "same_screenshot_again": resent,
        "beginning_reused_from_step_2": reused >= steps[0]["system_tokens"] // 32 * 32,
        "encoder_runs_for_resent_screenshot": resent["encoder_runs"],
    }


def warm_up(server: Server) -> None:
    content = [part(screenshot(1000)), {"type": "text", "text": "Warm up."}]
    ask(server, [{"role": "user", "content": content}])


def step(server: Server, conversation: list[dict[str, Any]]) -> dict[str, Any]:
    counters = ("vllm:mm_cache_queries_total", "vllm:mm_cache_hits_total")
    queries, hits = (server.metric(name) for name in counters)
    answer = ask(server, conversation)
    queries, hits = server.metric(counters[0]) - queries, server.metric(counters[1]) - hits
    system = server.post("/tokenize", tokenize_body(conversation[:1]))[1]["count"]
    return {
        "ttft_s": answer.ttft,
        "total_s": answer.times[-1] - answer.began,
        "prompt_tokens": answer.usage["prompt_tokens"],
        "cached_tokens": answer.usage["prompt_tokens_details"]["cached_tokens"],
        "encoder_runs": int(queries - hits),
        "system_tokens": system,
    }


def tokenize_body(messages: list[dict[str, Any]]) -> bytes:
    return json.dumps({"messages": messages, "add_generation_prompt": False}).encode()


def ask(server: Server, conversation: list[dict[str, Any]]) -> Any:
    body = {"messages": conversation, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    return stream(server, body)
