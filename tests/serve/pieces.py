"""Texts cut into pieces, as answers stream."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def cut(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> tuple[str, list[str]]:
    """A text and its pieces, some of them empty."""
    text = draw(texts)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def assembled(parts: list[str]) -> st.SearchStrategy[str]:
    """Texts that join some of these parts in any order."""
    return st.lists(st.sampled_from(parts), max_size=12).map("".join)
