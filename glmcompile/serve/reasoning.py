"""Thinking split off an answer's text as it streams, by the model's own markers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model marks its thinking, and the answer proper where it does that, too.

    The markers must reach the text: those that are special tokens are no longer to be skipped.
    """

    begin: str
    end: str
    answer: tuple[str, str] | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        return (self.begin, self.end, *(self.answer or ()))

    def count_tokens(self, answer: Sequence[bytes], *, opened: bool) -> int:
        """How many tokens of an answer are thinking, its markers included.

        answer: each token's text in UTF-8. opened: the prompt has opened the thinking.
        """
        whole = b"".join(answer)
        if not (opened or whole.lstrip().startswith(self.begin.encode())):
            return 0
        end = whole.find(self.end.encode())
        ends = list(accumulate(map(len, answer)))
        return len(answer) if end < 0 else bisect_left(ends, end + len(self.end.encode())) + 1

    def opened_by(self, prompt: str) -> bool:
        """Whether the prompt's last words, written by the template, open the thinking already."""
        return prompt.rstrip().endswith(self.begin)


# Qwen, GLM and DeepSeek; Mistral; Seed.
_KNOWN = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
_ANSWER = ("<answer>", "</answer>")


def reasoning_format(template: str, added_tokens: Iterable[str]) -> ReasoningFormat | None:
    """The format that the chat template speaks of or the tokenizer has tokens for; None without.

    added_tokens: the text of the tokenizer's added tokens.
    """
    tokens = set(added_tokens)

    def has(markers: tuple[str, str]) -> bool:
        return all(marker in template for marker in markers) or tokens.issuperset(markers)

    for begin, end in _KNOWN:
        if has((begin, end)):
            return ReasoningFormat(begin, end, _ANSWER if has(_ANSWER) else None)
    return None


class ReasoningParser:
    """Splits one answer into reasoning and content, however its text is cut into pieces.

    Thinking comes first or not at all; white space around it is dropped, and so are the markers of
    the answer proper. Thinking that never ends is reasoning to its last word.
    """

    def __init__(self, format: ReasoningFormat, *, opened: bool = False) -> None:
        """opened: the prompt has opened the thinking (`ReasoningFormat.opened_by`)."""
        self._format = format
        self._text = ""  # not given out yet
        self._step: Callable[[bool], tuple[str, str]]
        self._step = self._thinking if opened else self._beginning
        self._trims = opened  # drop white space at the beginning of what follows

    def add(self, text: str) -> tuple[str, str]:
        """Take a piece of the answer; returns what it adds to (reasoning, content)."""
        self._text += text
        return self._advance(last=False)

    def finish(self) -> tuple[str, str]:
        """Returns what was held back, because it might have been the beginning of a marker."""
        return self._advance(last=True)

    def _advance(self, last: bool) -> tuple[str, str]:
        reasoning, content = "", ""
        step = None
        while step != self._step:
            step = self._step
            if self._trims:
                self._text = self._text.lstrip()
                self._trims = not self._text
            more_reasoning, more_content = step(last)
            reasoning, content = reasoning + more_reasoning, content + more_content
        return reasoning, content

    def _beginning(self, last: bool) -> tuple[str, str]:
        words = self._text.lstrip()
        if words.startswith(self._format.begin):
            self._text = words.removeprefix(self._format.begin)
            self._step, self._trims = self._thinking, True
        elif last or not self._format.begin.startswith(words):
            self._step = self._answer
        return "", ""

    def _thinking(self, last: bool) -> tuple[str, str]:
        return self._up_to(self._format.end, self._answer, last), ""

    def _answer(self, last: bool) -> tuple[str, str]:
        if self._format.answer is None:
            self._step = self._content
        elif self._text.lstrip().startswith(self._format.answer[0]):
            self._text = self._text.lstrip().removeprefix(self._format.answer[0])
            self._step, self._trims = self._marked_content, True
        elif last or not self._format.answer[0].startswith(self._text.lstrip()):
            self._step = self._content
        return "", ""

    def _marked_content(self, last: bool) -> tuple[str, str]:
        assert self._format.answer is not None
        return "", self._up_to(self._format.answer[1], self._content, last)

    def _content(self, last: bool) -> tuple[str, str]:
        content, self._text = self._text, ""
        return "", content

    def _up_to(self, marker: str, following: Callable[[bool], tuple[str, str]], last: bool) -> str:
        """What is known to stand before the marker; past it, `following` goes on."""
        before, found, rest = self._text.partition(marker)
        if found:
            self._text, self._step, self._trims = rest, following, True
            return before.rstrip()
        if last:
            self._text = ""
            return before.rstrip()
        self._text = held_back(before, marker)
        return before.removesuffix(self._text)


def held_back(text: str, marker: str) -> str:
    """The end of the text that may begin the marker, with the white space before it."""
    start = len(text)
    for length in range(min(len(text), len(marker)), 0, -1):
        if marker.startswith(text[-length:]):
            start -= length
            break
    return text[len(text[:start].rstrip()) :]
