"""Events come out as they were put in, wherever the network cuts the stream."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmcompile.bench.load.sse import EventDecoder

LINE = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=8)
EVENT = st.lists(LINE, min_size=1, max_size=3)  # the lines of its data


@given(
    data=st.data(), events=st.lists(EVENT, max_size=5), end=st.sampled_from(["\n", "\r\n", "\r"])
)
def test_any_cut_gives_the_same_events(
    data: st.DataObject, events: list[list[str]], end: str
) -> None:
    stream = "".join(
        f": comment{end}id: 1{end}" + "".join(f"data: {line}{end}" for line in lines) + end
        for lines in events
    ).encode()
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12).map(sorted))
    bounds = [0, *cuts, len(stream)]
    decoder, found = EventDecoder(), []
    for start, stop in pairwise(bounds):
        found += decoder.feed(stream[start:stop])
    assert found == ["\n".join(lines) for lines in events]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (b"data:no space\n\n", ["no space"]),
        (b"data:  two spaces\n\n", [" two spaces"]),
        (b"data\n\n", [""]),
        (b"event: ping\n\n", []),
        (b": keep-alive\n\ndata: a\n\n\n\ndata: b\n\n", ["a", "b"]),
        (b"data: never ended\n", []),
        (b"data: \xff\n\n", ["\ufffd"]),
    ],
)
def test_fields_and_comments(stream: bytes, expected: list[str]) -> None:
    assert EventDecoder().feed(stream) == expected


def test_an_event_comes_as_soon_as_it_is_complete() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"data: a\r\n\r") == ["a"]
    assert decoder.feed(b"\ndata: b\r\n\r\n") == ["b"]
