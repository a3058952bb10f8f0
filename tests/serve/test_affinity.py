"""Where requests go: by how their conversation begins, unless that replica has too much."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from glmcompile.serve.affinity import conversation_key, order, preference

SYSTEM = {"role": "system", "content": "You use a phone."}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TASK = {"type": "text", "text": "Open Mail."}


def key(**body: Any) -> bytes | None:
    return conversation_key(json.dumps(body).encode())


def chat(*turns: dict[str, Any]) -> bytes | None:
    return key(messages=[SYSTEM, *turns], temperature=0)


def test_an_agents_conversation_keeps_its_key_when_it_drops_its_screenshots() -> None:
    first = chat({"role": "user", "content": [PICTURE, TASK]})
    later = chat(
        {"role": "user", "content": [TASK]},
        {"role": "assistant", "content": "do(action='Tap')"},
        {"role": "user", "content": [PICTURE, {"type": "text", "text": "** Screen Info **"}]},
    )
    assert first is not None
    assert first == later
    assert first != chat({"role": "user", "content": [PICTURE, {**TASK, "text": "Open Maps."}]})


def test_a_picture_alone_is_a_beginning() -> None:
    other = {"type": "image_url", "image_url": {"url": "data:image/png;base64,BBBB"}}
    assert chat({"role": "user", "content": [PICTURE]}) != chat(
        {"role": "user", "content": [other]}
    )


def test_every_route_that_computes_has_keys() -> None:
    keys = {
        key(prompt="Once"),
        key(prompt=[1, 2, 3]),
        key(inputs={"text": "Once upon"}),
        key(input="Hello"),
        key(input="Hello", instructions="Be short."),
        key(input=[{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]),
    }
    assert None not in keys
    assert len(keys) == 6


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b'{"messages": 3}', b'{"messages": [3]}', b"\xff", b"{}"]
)
def test_what_has_no_beginning_has_no_key(body: bytes) -> None:
    assert conversation_key(body) is None


def test_keys_spread_evenly_and_stay_when_another_replica_is_away() -> None:
    keys = [str(number).encode() for number in range(3000)]
    homes = Counter(preference(key, 3)[0] for key in keys)
    assert all(900 < count < 1100 for count in homes.values())
    for each in keys:
        ranked = preference(each, 3)
        if ranked[0] != 2:  # the one that is away was not its home
            assert next(place for place in ranked if place != 2) == ranked[0]


def test_a_replica_with_more_than_its_share_is_tried_last() -> None:
    home, second = preference(b"key", 2)
    loads = [0, 0]
    assert order(b"key", loads) == [home, second]
    loads[home] = 1
    assert order(b"key", loads) == [home, second]
    loads[home] = 8
    assert order(b"key", loads) == [second, home]
    loads[second] = 7
    assert order(b"key", loads) == [home, second]


def test_without_a_key_the_least_loaded_comes_first() -> None:
    assert order(None, [3, 1, 2]) == [1, 2, 0]
