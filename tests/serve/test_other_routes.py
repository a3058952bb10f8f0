"""`/v1/generate`, `/tokenize`, `/v1/models`, and what the server says of itself."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import glmcompile
from tests.serve.requests import CHAT, LONG, SCREEN, ask, chat, data_url
from tests.serve.servers import ServerThread


def test_generate_answers_a_text_with_its_image(server: ServerThread) -> None:
    own = server.engine.generate(prompt="Open Chat.", images=[SCREEN], max_tokens=24)
    image = base64.b64encode(SCREEN.read_bytes()).decode()
    for given in (image, data_url(SCREEN.read_bytes()), [image]):
        inputs = {"text": "Open Chat.", "image": given}
        parameters = {"multimodal": True, "max_new_tokens": 24, "do_sample": False}
        done = server.post("/v1/generate", {"inputs": inputs, "parameters": parameters}).json()
        assert done["generated_text"] == own.text
        assert done["usage"]["completion_tokens"] == own.usage.completion_tokens


@pytest.mark.parametrize(
    ("inputs", "parameters", "name"),
    [
        ({"text": "x", "image": "AAAA"}, {"multimodal": False}, "multimodal"),
        ({"text": "x"}, {"multimodal": True}, "multimodal"),
        ({"text": "x", "image": "/etc/passwd"}, {}, "image"),
        ({"text": "x", "image": []}, {}, "image"),
        ({"image": "AAAA"}, {}, "text"),
        ({"text": "x"}, {"do_sample": False, "temperature": 1.0}, "do_sample"),
        ({"text": "x"}, {"beams": 2}, "beams"),
    ],
)
def test_generate_names_what_it_refuses(
    server: ServerThread, inputs: dict[str, Any], parameters: dict[str, Any], name: str
) -> None:
    response = server.post("/v1/generate", {"inputs": inputs, "parameters": parameters})
    assert response.status_code == 400, response.text
    assert name in response.json()["error"]["message"]


def test_text_goes_to_tokens_and_back(server: ServerThread) -> None:
    text = "Open Chat, bitte: 你好"
    tokens = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 4096
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json()["prompt"] == text


def test_a_chats_tokens_are_those_that_its_answer_follows(server: ServerThread) -> None:
    messages = ask("Open Chat.", SCREEN.read_bytes())
    count = server.post("/tokenize", {"messages": messages}).json()["count"]
    usage = server.post(CHAT, chat(messages=messages)).json()["usage"]
    assert count == usage["prompt_tokens"] > 70


def test_tokenize_takes_a_prompt_or_messages(server: ServerThread) -> None:
    for request in ({}, {"prompt": "x", "messages": ask("x")}):
        assert server.post("/tokenize", request).status_code == 400
    assert server.post("/detokenize", {"tokens": [10**6]}).status_code == 400


def test_models_are_listed_by_every_name(server: ServerThread) -> None:
    assert [model.id for model in server.openai.models.list()] == ["reference", "alias"]
    assert server.openai.models.retrieve("alias").id == "alias"
    assert server.get("/v1/models/nobody").json()["error"]["code"] == "model_not_found"
    assert server.post(CHAT, chat(model="alias")).json()["model"] == "alias"


def test_health_readiness_and_version(server: ServerThread) -> None:
    assert server.get("/health").status_code == 200
    assert server.get("/ready").status_code == 200
    assert server.get("/version").json() == {"version": glmcompile_version()}


def glmcompile_version() -> str:
    import importlib.metadata

    return importlib.metadata.version(glmcompile.__name__)


def metrics(server: ServerThread) -> dict[str, float]:
    """Samples by name and what of their labels is not the same everywhere."""
    found = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "reference"
            assert labels.pop("engine") == "0"
            found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def test_metrics_count_what_was_done(server: ServerThread) -> None:
    before = metrics(server)
    image = SCREEN.read_bytes()
    request = chat(messages=ask("Close what is open.", image), max_tokens=5, **LONG)
    usages = [server.post(CHAT, request).json()["usage"] for _ in range(2)]
    after = metrics(server)
    grown = {name: value - before[name] for name, value in after.items()}
    prompt = usages[0]["prompt_tokens"]
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert cached > 0
    expected = {
        "vllm:prompt_tokens_total": 2 * prompt,
        "vllm:prompt_tokens_cached_total": cached,
        "vllm:prefix_cache_queries_total": 2 * prompt,
        "vllm:prefix_cache_hits_total": cached,
        "vllm:generation_tokens_total": 10,
        "vllm:mm_cache_queries_total": 2,
        "vllm:request_success_total length": 2,
        "vllm:request_success_total stop": 0,
        "vllm:time_to_first_token_seconds_count": 2,
        "vllm:inter_token_latency_seconds_count": 8,
        "vllm:request_time_per_output_token_seconds_count": 2,
        "vllm:e2e_request_latency_seconds_count": 2,
        "vllm:request_prompt_tokens_sum": 2 * prompt,
        "vllm:request_generation_tokens_sum": 10,
        "vllm:request_generation_tokens_bucket 8.0": 2,
        "vllm:request_generation_tokens_bucket 1.0": 0,
    }
    assert {name: grown[name] for name in expected} == expected
    assert grown["vllm:mm_cache_hits_total"] >= 1
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["vllm:kv_cache_usage_perc"] == 0


def test_histograms_count_every_value_in_one_bucket(server: ServerThread) -> None:
    server.post(CHAT, chat())
    found = metrics(server)
    for name in ("vllm:time_to_first_token_seconds", "vllm:iteration_tokens_total"):
        buckets = [value for key, value in found.items() if key.startswith(f"{name}_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == found[f"{name}_bucket +Inf"] == found[f"{name}_count"] > 0
