"""What form an answer has: the grammar that it follows, and the parts its text is split into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from glmcompile.errors import InputError
from glmcompile.runtime.grammar import Grammar
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.prompt import PromptBuilder
from glmcompile.serve.protocol.structured import one_grammar
from glmcompile.serve.reasoning import ReasoningFormat, ReasoningParser, reasoning_format
from glmcompile.serve.tokens import TokenTexts
from glmcompile.serve.tool_formats import ToolCall, ToolFormat, tool_format
from glmcompile.serve.tools import Tool, ToolParser, tool_grammar, tool_parameters


class AnswerParts(NamedTuple):
    """What a piece of text, or all of it, adds to an answer."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


@dataclass(frozen=True)
class AnswerForm:
    """How an answer is to be read.

    grammar: what it must follow, None for free text.
    reasoning: how its thinking is marked, None where that is not split off. opened: the prompt has
        begun it already. shows_reasoning: it is given out, not dropped.
    tool_format, tools: how calls are marked and what may be called, None where none are read.
    parallel: more than one call is given out.
    """

    grammar: Grammar | None = None
    reasoning: ReasoningFormat | None = None
    opened: bool = False
    shows_reasoning: bool = True
    tool_format: ToolFormat | None = None
    tools: Sequence[Tool] = ()
    parallel: bool = True

    @property
    def markers(self) -> tuple[str, ...]:
        """Tokens that the text must show for its parts to be found."""
        reasoning = self.reasoning.markers if self.reasoning is not None else ()
        return (*reasoning, *(self.tool_format.markers if self.tool_format is not None else ()))

    def reasoning_tokens(self, token_ids: Sequence[int], texts: TokenTexts) -> int:
        """Tokens of an answer that are its thinking; 0 where that is not told apart."""
        if self.reasoning is None:
            return 0
        return self.reasoning.count_tokens(
            [texts.encoded(id) for id in token_ids], opened=self.opened
        )

    def parser(self) -> AnswerParser:
        """Of one answer."""
        return AnswerParser(self)

    def split(self, text: str) -> AnswerParts:
        """A whole answer."""
        return self.parser().add(text, last=True)


class AnswerParser:
    """Splits one answer's text, however it is cut into pieces."""

    def __init__(self, form: AnswerForm) -> None:
        self._form = form
        self._thinking = (
            ReasoningParser(form.reasoning, opened=form.opened) if form.reasoning else None
        )
        self._tools = ToolParser(form.tool_format, form.tools) if form.tool_format else None
        self._num_calls = 0

    def add(self, text: str, *, last: bool = False) -> AnswerParts:
        """Take a piece. last: nothing follows it, so that nothing is held back any more."""
        reasoning, content = "", text
        calls: list[ToolCall] = []
        if self._thinking is not None:
            reasoning, content = self._thinking.add(text)
            if last:
                more_reasoning, more_content = self._thinking.finish()
                reasoning, content = reasoning + more_reasoning, content + more_content
        if self._tools is not None:
            content, calls = self._tools.add(content)
            if last:
                more, further = self._tools.finish()
                content, calls = content + more, calls + further
        if not self._form.parallel:
            calls = calls[: 1 - self._num_calls]
        self._num_calls += len(calls)
        return AnswerParts(reasoning if self._form.shows_reasoning else "", content, tuple(calls))


class AnswerForms:
    """The forms of one model's answers, by what its chat template and tokenizer say."""

    def __init__(self, prompts: PromptBuilder, *, split_reasoning: bool) -> None:
        """split_reasoning: for requests that do not say whether they want it."""
        self._prompts, self._split_reasoning = prompts, split_reasoning
        added = prompts.tokenizer.get_added_tokens_decoder().values()
        template = prompts.chat_template
        self._takes_tools = "tools" in template
        self._reasoning = reasoning_format(template, [token.content for token in added])
        self._tools = tool_format(template)

    def of(
        self,
        prompt: Prompt,
        *,
        grammar: Grammar | None,
        include_reasoning: bool | None,
        tools: Sequence[Tool] | None,
        tool_choice: Any,
        parallel: bool,
    ) -> AnswerForm:
        """The form of one request's answers. prompt: a chat.

        include_reasoning: True gives thinking out apart, False drops it, None is the server's rule.
        Raises InputError for tools that this model cannot be told of, and for forms that collide.
        """
        form = AnswerForm(grammar=grammar, shows_reasoning=include_reasoning is not False)
        if include_reasoning is not None or self._split_reasoning:
            form = replace(form, reasoning=self._reasoning)
        if tools:
            form = self._with_tools(form, tools, tool_choice, parallel)
        elif tool_choice not in (None, "none", "auto"):
            raise InputError("tool_choice asks for a call, but `tools` has none")
        return self._after_thinking(form, prompt)

    def _with_tools(
        self, form: AnswerForm, tools: Sequence[Tool], choice: Any, parallel: bool
    ) -> AnswerForm:
        tool_parameters(tools)
        if not self._takes_tools:
            raise InputError("tools: this model's chat template has no place for them")
        required = tool_grammar(self._tools, tools, choice, parallel=parallel)
        if choice == "none":
            return form
        if form.grammar is not None and required is None:
            raise InputError(
                "tools beside a form of the answer exclude each other; set tool_choice to none, "
                "or leave one of them out"
            )
        return replace(
            form,
            grammar=one_grammar(form.grammar, required),
            tool_format=self._tools,
            tools=tools,
            parallel=parallel,
        )

    def _after_thinking(self, form: AnswerForm, prompt: Prompt) -> AnswerForm:
        """The form, told whether the prompt opens the thinking, after which its grammar begins."""
        marks = self._reasoning
        if marks is None or (form.reasoning is None and form.grammar is None):
            return form
        messages, _ = self._prompts.split_images(prompt.messages or ())
        opened = marks.opened_by(
            self._prompts.render(messages, tools=prompt.tools, options=prompt.template_options)
        )
        form = replace(form, opened=opened)
        if form.grammar is None or not (form.reasoning or opened):
            return form
        begin = None if opened else marks.begin
        return replace(form, grammar=replace(form.grammar, after=marks.end, opened_by=begin))
