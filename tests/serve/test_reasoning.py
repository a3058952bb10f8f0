"""Thinking split off answers: whole, streamed in any pieces, cut short, and not there at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmcompile.serve.reasoning import ReasoningFormat, ReasoningParser, reasoning_format
from tests.serve.pieces import assembled, cut

THINK = ReasoningFormat("<think>", "</think>")
AGENT = ReasoningFormat("<think>", "</think>", ("<answer>", "</answer>"))


def split(
    pieces: list[str], format: ReasoningFormat = THINK, opened: bool = False
) -> tuple[str, str]:
    parser = ReasoningParser(format, opened=opened)
    deltas = [parser.add(piece) for piece in pieces] + [parser.finish()]
    return "".join(delta[0] for delta in deltas), "".join(delta[1] for delta in deltas)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>So.</think>Yes.", ("So.", "Yes.")),
        ("\n<think>\nSo. \n\n</think>\n\nYes.\n", ("So.", "Yes.\n")),
        ("<think></think> Yes", ("", "Yes")),
        ("Yes, <think>no</think>", ("", "Yes, <think>no</think>")),
        ("  Yes", ("", "  Yes")),
        ("<think>So it", ("So it", "")),
        ("<think>a </thin", ("a </thin", "")),
        ("<thin", ("", "<thin")),
        ("", ("", "")),
        ("<think>a</think>b</think>c", ("a", "b</think>c")),
    ],
)
def test_answers_are_split_at_the_markers(text: str, expected: tuple[str, str]) -> None:
    assert split([text]) == expected
    assert split(list(text)) == expected


@pytest.mark.parametrize(
    ("tokens", "opened", "expected"),
    [
        (["<think>", "So", ".", "</think>", "Yes"], False, 4),
        (["<th", "ink>So", ".</", "think>Yes", "."], False, 4),
        (["\n", "<think>", "So"], False, 3),
        (["Yes", "<think>", "</think>"], False, 0),
        (["So", "</think>", "Yes", "</think>"], True, 2),
        (["So", "Yes"], True, 2),
        ([], False, 0),
    ],
)
def test_tokens_of_the_thinking_are_counted(tokens: list[str], opened: bool, expected: int) -> None:
    assert THINK.count_tokens([each.encode() for each in tokens], opened=opened) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So.\n</think>\nYes.", ("So.", "Yes.")),
        ("\nSo.", ("So.", "")),
        ("</think>Yes", ("", "Yes")),
    ],
)
def test_the_prompt_may_have_opened_the_thinking(text: str, expected: tuple[str, str]) -> None:
    assert split([text], opened=True) == expected
    assert split(list(text), opened=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '<think>Tap it.</think><answer>do(action="Tap", element=[1,2])</answer>',
            ("Tap it.", 'do(action="Tap", element=[1,2])'),
        ),
        ("<think>a</think>\n<answer>\nb\n</answer>\n", ("a", "b")),
        ("<think>a</think>b <answer>c</answer>", ("a", "b <answer>c</answer>")),
        ("<answer>b</answer> c", ("", "bc")),
        ("<think>a</think><answer>b", ("a", "b")),
        ("<think>a</think><answ", ("a", "<answ")),
    ],
)
def test_the_markers_of_the_answer_proper_are_dropped(text: str, expected: tuple[str, str]) -> None:
    assert split([text], AGENT) == expected
    assert split(list(text), AGENT) == expected


PARTS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<",
    "</",
    "thi",
    "k>",
    " ",
    "\n",
    "é",
    "b",
]


@given(cut(assembled(PARTS)), st.sampled_from([THINK, AGENT]), st.booleans())
def test_any_pieces_give_what_the_whole_gives(
    cut_text: tuple[str, list[str]], format: ReasoningFormat, opened: bool
) -> None:
    text, pieces = cut_text
    assert split(pieces, format, opened) == split([text], format, opened)


@given(assembled(PARTS), st.booleans())
def test_nothing_but_markers_and_white_space_is_lost(text: str, opened: bool) -> None:
    kept = "".join(split([text], AGENT, opened))
    for marker in AGENT.markers:
        text, kept = text.replace(marker, ""), kept.replace(marker, "")
    assert "".join(kept.split()) == "".join(text.split())


def test_what_cannot_be_a_marker_is_given_out_at_once() -> None:
    parser = ReasoningParser(THINK)
    assert parser.add("<think>abc") == ("abc", "")
    assert parser.add(" d</") == (" d", "")
    assert parser.add("b> <") == ("</b>", "")
    assert parser.add("/think>e <") == ("", "e <")


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [
        ("...{{ '<think>' }} {% if '</think>' in content %}", [], THINK),
        ("", ["<|image|>", "<think>", "</think>", "<answer>", "</answer>"], AGENT),
        ("split('</think>')", ["<think>"], None),
        ("[THINK]a[/THINK]", [], ReasoningFormat("[THINK]", "[/THINK]")),
        ("{{ message.content }}", ["<|endoftext|>"], None),
    ],
)
def test_the_format_is_found_in_template_or_tokenizer(
    template: str, tokens: list[str], expected: ReasoningFormat | None
) -> None:
    assert reasoning_format(template, tokens) == expected


def test_a_prompt_opens_the_thinking_by_its_last_words_alone() -> None:
    assert THINK.opened_by("<|assistant|>\n<think>\n")
    assert not THINK.opened_by("<|user|>say <think> twice<|assistant|>\n")
    assert not THINK.opened_by("<|assistant|>\n<think>\n\n</think>\n\n")
