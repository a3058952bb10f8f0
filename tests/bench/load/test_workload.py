"""Requests are of the sizes asked for, none like another, and the same for a seed."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glmcompile.bench.load.workload import (
    Composer,
    Span,
    Workload,
    read_conversations,
    screen_png,
)
from glmcompile.errors import InputError


def composed(workload: Workload, index: int = 0, seed: int = 1) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(
        Composer(workload, "model", "max_tokens", seed, tokens_per_word=2.0).compose(index)
    )
    return body


def test_a_request_asks_for_a_counted_stream() -> None:
    body = composed(Workload(Span(20, 20), Span(5, 5), ignore_eos=True))
    assert len(body["messages"][0]["content"].split()) == 10
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("model", 5, True)
    assert "ignore_eos" not in composed(Workload())


def test_spans_are_drawn_to_both_ends() -> None:
    rng = np.random.default_rng(0)
    assert {Span(3, 6).draw(rng) for _ in range(200)} == {3, 4, 5, 6}


def test_the_seed_decides_what_is_sent() -> None:
    workload = Workload(Span(10, 90), Span(1, 9), image_sizes=((28, 28), (56, 28)))
    assert composed(workload, 3) == composed(workload, 3)
    assert composed(workload, 3) != composed(workload, 4)
    assert composed(workload, 3) != composed(workload, 3, seed=2)


def test_the_system_prompt_is_shared_and_the_rest_is_not() -> None:
    first, second = (composed(Workload(system_tokens=30), index)["messages"] for index in (0, 1))
    assert first[0] == second[0]
    assert first[0]["role"] == "system"
    assert len(first[0]["content"].split()) == 15
    assert first[1] != second[1]


def test_pictures_have_the_sizes_asked_for_and_stand_before_the_text() -> None:
    sizes = ((64, 48), (30, 90))
    found = set()
    for index in range(12):
        picture, text = composed(Workload(image_sizes=sizes), index)["messages"][0]["content"]
        assert text["type"] == "text"
        prefix, data = picture["image_url"]["url"].split(",")
        assert prefix == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.format == "PNG"
        found.add(image.size)
    assert found == set(sizes)


def test_no_two_pictures_are_alike() -> None:
    def pixels(index: int) -> bytes:
        image = Image.open(io.BytesIO(screen_png(8, 8, 1, index)))
        return hashlib.sha256(image.tobytes()).digest()

    assert len({pixels(index) for index in range(300)}) == 300


def test_conversations_are_sent_in_turn(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [[{"role": "user", "content": text}] for text in ("one", "two")]
    file.write_text(f"{json.dumps(messages[0])}\n\n{json.dumps({'messages': messages[1]})}\n")
    workload = Workload(conversations=read_conversations(file))
    assert [composed(workload, index)["messages"] for index in range(3)] == [
        messages[0],
        messages[1],
        messages[0],
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{]", "line 1: not JSON"),
        ('[{"role": "user"}]\n{"prompt": "x"}', "line 2: a list of messages"),
        ("[]", "line 1: a list of messages"),
        ('["text"]', "line 1: a list of messages"),
        ("\n", "no conversation"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=words):
        read_conversations(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_conversations(tmp_path / "gone")
