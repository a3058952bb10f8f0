"""The accuracy driver on tiny engines, whose predictions are known from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import glmcompile
from glmcompile.errors import InputError
from glmcompile.evaluate.accuracy import evaluate
from glmcompile.runtime.engine import Engine
from tests.engines import TinyEngine

Engines = Callable[..., TinyEngine]


def load(path: Path) -> Engine:
    return glmcompile.load(path, threads=1, kv_cache_bytes=8 << 20)


def test_an_engine_agrees_with_itself(tiny_engine: Engines) -> None:
    with load(tiny_engine("glm4v").path) as engine, load(engine.path) as same:
        result = evaluate(engine, same, count=9)
    match, forced = result["exact_match"], result["teacher_forcing"]
    assert match["samples"] == 9
    assert match["difference"]["value"] == 0
    assert len(match["by_kind"]) == 9
    assert forced["top1_agreement"] == 1
    assert forced["kl_divergence"] == pytest.approx(0, abs=1e-12)
    assert forced["perplexity_increase"] == pytest.approx(0)
    assert set(forced["perplexity"]) == {"fp32", "fp32 baseline"}


def test_int8_is_compared_with_float32_on_text(tiny_engine: Engines) -> None:
    int8, fp32 = tiny_engine("llama", "int8").path, tiny_engine("llama").path
    with load(int8) as engine, load(fp32) as baseline:
        result = evaluate(engine, baseline, count=2)
    assert "exact_match" not in result
    forced = result["teacher_forcing"]
    assert set(forced["perplexity"]) == {"fp32", "int8"}
    assert forced["scope"] == "tokens of text"
    assert forced["tokens"] > 100
    assert 0 < forced["kl_divergence"] < 1


def test_an_answers_perplexity_is_what_generation_gave_its_token(
    tiny_engine: Engines, tmp_path: Path
) -> None:
    line = {"prompt": "Which letter?", "answer": "a"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(line) + "\n")
    path = tiny_engine("llama").path
    token = Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id("a")
    with load(path) as engine:
        (chosen,) = engine.generate(
            prompt=line["prompt"], max_tokens=1, logprobs=engine.model.vocab_size
        ).logprobs
        forced = evaluate(engine, samples=tmp_path)["teacher_forcing"]
    assert forced["tokens"] == 1
    expected = np.exp(-dict(chosen.top_logprobs)[token])
    assert forced["perplexity"]["fp32"] == pytest.approx(expected, rel=1e-4)


def test_a_folders_right_answers_are_counted(tiny_engine: Engines, tmp_path: Path) -> None:
    with load(tiny_engine("llama").path) as engine:
        answer = engine.generate(prompt="Say something.", max_tokens=64).text
        lines = [
            {"prompt": "Say something.", "answer": answer or " "},
            {"prompt": "Say something.", "answer": "surely not this"},
        ]
        (tmp_path / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        match = evaluate(engine, samples=tmp_path)["exact_match"]
    assert match["fp32"]["value"] == 0.5
    assert match["fp32"]["low"] < 0.5 < match["fp32"]["high"]


def test_engines_of_different_vocabularies_are_refused(tiny_engine: Engines) -> None:
    int8, fp32 = tiny_engine("llama", "int8").path, tiny_engine("llama").path
    with load(int8) as engine, load(fp32) as baseline:
        baseline.model = replace(baseline.model, vocab_size=7)
        with pytest.raises(InputError, match="of 7 and 288 tokens"):
            evaluate(engine, baseline)
