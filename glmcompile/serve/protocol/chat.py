"""Chat completions: the request, the answer, and the pieces of a streamed one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from glmcompile.errors import InputError
from glmcompile.runtime.grammar import Grammar
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.serve.answer_form import AnswerForm, AnswerForms
from glmcompile.serve.protocol.common import Harmless, Sampling, StreamOptions, TokenUsage
from glmcompile.serve.protocol.structured import ResponseFormat, StructuredOutputs, one_grammar

_NOTHING = ((), "leave it out")
_TEXT_ALONE = ((["text"],), "answers are text")
_FUNCTIONS = ((), "it is OpenAI's former form; use `tools` and `tool_choice`")


class ChatRequest(Harmless, Sampling):
    """`POST /v1/chat/completions`.

    messages: as OpenAI writes them; further fields of a message reach the chat template. Images
    are `image_url` parts with data URLs; their `detail` is accepted and changes nothing, since
    `mm_processor_kwargs` sets the size.
    chat_template_kwargs: further names for the chat template. mm_processor_kwargs: max_pixels,
    below the engine's own, for each image of this request.
    include_reasoning: true gives the thinking of a model that marks it as `reasoning_content`,
    false leaves it out; by default it is part of the text, unless the server was started to split.
    """

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    store: bool = False

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "audio": _NOTHING,
        "modalities": _TEXT_ALONE,
        "prediction": _NOTHING,
        "web_search_options": _NOTHING,
        "verbosity": _NOTHING,
        "functions": _FUNCTIONS,
        "function_call": _FUNCTIONS,
        "reasoning_effort": ((), "give what the template knows in `chat_template_kwargs`"),
        "best_of": ((1,), "use `n`"),
        "use_beam_search": ((False,), "answers are sampled"),
        "length_penalty": ((1, 1.0), "it belongs to beam search"),
        "echo": ((False,), "the prompt is not repeated"),
        "add_generation_prompt": ((True,), "an answer needs it"),
        "continue_final_message": ((False,), "use /v1/completions with the whole prompt"),
        "chat_template": ((), "the engine's own is used"),
        "documents": (([],), "put their text into a message"),
        "prompt_logprobs": ((), "use `logprobs` for those of the answer"),
        "skip_special_tokens": ((True,), "control tokens have no text"),
        "spaces_between_special_tokens": ((True,), "control tokens have no text"),
        "include_stop_str_in_output": ((False,), "the answer ends before it"),
        "bad_words": (([],), "use `logit_bias`"),
        "allowed_token_ids": ((), "use `logit_bias`"),
        "truncate_prompt_tokens": ((), "shorten the prompt"),
        **dict.fromkeys(
            ("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
            ((), "it is vLLM's former form; use `structured_outputs`"),
        ),
    }

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` is given, but `logprobs` is not true; set it, too")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is given, but `stream` is not true; set it, too")
        return self

    def form(self, forms: AnswerForms, prompt: Prompt) -> AnswerForm:
        """prompt: of this request. Raises InputError for what the model cannot be asked for."""
        structured, format = self.structured_outputs, self.response_format
        return forms.of(
            prompt,
            grammar=one_grammar(
                structured.to_grammar() if structured is not None else None,
                format.grammar() if format is not None else None,
            ),
            include_reasoning=self.include_reasoning,
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel=self.parallel_tool_calls,
        )

    def params(self, defaults: Mapping[str, Any], grammar: Grammar | None) -> SamplingParams:
        """defaults: see Sampling. Raises InputError naming an option that is out of range."""
        longest = self.max_completion_tokens
        return self.sampling_params(
            defaults,
            max_tokens=self.max_tokens if longest is None else longest,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            grammar=grammar,
        )

    def prompt(self) -> Prompt:
        """Raises InputError naming a message that no chat has."""
        return Prompt(
            messages=chat_messages(self.messages),
            tools=None if self.tool_choice == "none" else self.tools,
            template_options=self.chat_template_kwargs,
            mm_processor_kwargs=self.mm_processor_kwargs,
        )


def chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates want them.

    Arguments of earlier tool calls are JSON in a string in OpenAI's form; templates expect them
    parsed.
    """
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    if (calls := message.get("tool_calls")) is None:
        return message
    if not isinstance(calls, list):
        raise InputError(f"{where}.tool_calls: expected a list")
    parsed = [_tool_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)]
    return {**message, "tool_calls": parsed}


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: expected `function` with `name` and `arguments`")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}.function.arguments: not valid JSON ({error})") from error
    return {**call, "function": {**function, "arguments": arguments}}


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]


class CalledFunction(BaseModel):
    name: str
    arguments: str


class MessageToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str
    stop_reason: str | int | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
