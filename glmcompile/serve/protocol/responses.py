"""Responses, in the stateless form: every request brings its whole conversation along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from glmcompile.errors import InputError
from glmcompile.runtime.grammar import Grammar
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.request import Usage
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.serve.answer_form import AnswerForm, AnswerForms
from glmcompile.serve.protocol.chat import chat_messages
from glmcompile.serve.protocol.common import Body, Harmless, Sampling
from glmcompile.serve.protocol.structured import TextFormat

_STATELESS = "nothing is stored here; send the whole conversation as `input`"
_TEXT_PARTS = ("input_text", "output_text", "text")


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(Harmless, Sampling):
    """`POST /v1/responses`.

    input: a user's message as text, or items: messages, function calls and their outputs; parts of
    a message are `input_text`, `output_text` and `input_image` with a data URL.
    """

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "store": ((False,), _STATELESS),
        "previous_response_id": ((), _STATELESS),
        "conversation": ((), _STATELESS),
        "background": ((False,), _STATELESS),
        "prompt": ((), _STATELESS),
        "truncation": (("disabled",), "shorten the input"),
        "include": (([],), "there is nothing further to include"),
        "max_tool_calls": ((), "tools run at the client"),
        "reasoning": (({},), "give what the template knows in `chat_template_kwargs`"),
        "stream_options": (({},), "usage is in the last event"),
        "top_logprobs": ((0,), "use /v1/chat/completions"),
    }

    def form(self, forms: AnswerForms, prompt: Prompt) -> AnswerForm:
        """prompt: of this request. Raises InputError for what the model cannot be asked for."""
        format = self.text.format if self.text is not None else None
        return forms.of(
            prompt,
            grammar=format.grammar() if format is not None else None,
            include_reasoning=self.include_reasoning,
            tools=self.chat_tools(),
            tool_choice=self.tool_choice,
            parallel=self.parallel_tool_calls,
        )

    def params(self, defaults: Mapping[str, Any], grammar: Grammar | None) -> SamplingParams:
        """defaults: see Sampling. Raises InputError naming an option that is out of range."""
        return self.sampling_params(
            defaults, max_tokens=self.max_output_tokens, logprobs=None, grammar=grammar
        )

    def chat_tools(self) -> list[dict[str, Any]] | None:
        """The tools in the form of chat completions, which templates know.

        Raises InputError for tools that run at a provider.
        """
        if self.tools is None:
            return None
        for place, tool in enumerate(self.tools):
            if tool.get("type") != "function":
                raise InputError(
                    f"tools[{place}]: type {tool.get('type')!r} is not supported; use function"
                )
        return [
            {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
            for tool in self.tools
        ]

    def prompt(self) -> Prompt:
        """Raises InputError naming an item that is not understood."""
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            for place, item in enumerate(self.input):
                _append(messages, item, f"input[{place}]")
        return Prompt(
            messages=chat_messages(messages),
            tools=None if self.tool_choice == "none" else self.chat_tools(),
            template_options=self.chat_template_kwargs,
            mm_processor_kwargs=self.mm_processor_kwargs,
        )


def _append(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """One item as a chat message; function calls join the assistant's message before them."""
    match item.get("type", "message"):
        case "message":
            content = item.get("content")
            if isinstance(content, list):
                content = [
                    _part(part, f"{where}.content[{place}]") for place, part in enumerate(content)
                ]
            messages.append({"role": item.get("role"), "content": content})
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        case "function_call_output":
            output = item.get("output")
            messages.append(
                {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
            )
        case "reasoning":  # of earlier turns; templates leave it out as well
            pass
        case other:
            raise InputError(f"{where}: type {other!r} is not supported; use message")


def _part(part: Any, where: str) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS:
        return {"type": "text", "text": part.get("text")}
    if kind == "input_image":
        if not isinstance(url := part.get("image_url"), str):
            raise InputError(f"{where}: expected `image_url` to be a data URL; there are no files")
        return {"type": "image_url", "image_url": {"url": url}}
    raise InputError(f"{where}: type {kind!r} is not supported; use input_text or input_image")


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    type: Literal["message"] = "message"
    id: str
    status: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputCall(BaseModel):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(BaseModel):
    type: Literal["reasoning"] = "reasoning"
    id: str
    status: str
    summary: list[Any] = []
    content: list[ReasoningText]


OutputItem = OutputReasoning | OutputMessage | OutputCall


class InputTokensDetails(BaseModel):
    cached_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage, reasoning_tokens: int) -> ResponseUsage:
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=usage.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=reasoning_tokens),
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )


class IncompleteDetails(BaseModel):
    reason: str


class ModelResponse(BaseModel):
    """status: in_progress, completed, or incomplete where max_output_tokens or context ended it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    model: str
    status: str
    output: list[OutputItem]
    usage: ResponseUsage | None = None
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    metadata: dict[str, Any] = {}
    parallel_tool_calls: bool = True
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    tool_choice: Any = "auto"
    tools: list[dict[str, Any]] = []
    store: Literal[False] = False
