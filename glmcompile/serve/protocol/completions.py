"""Plain completions: the request and the answer, in OpenAI's legacy form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.serve.protocol.common import Harmless, Sampling, StreamOptions, TokenUsage

_TokenIds = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(Harmless, Sampling):
    """`POST /v1/completions`.

    prompt: a text, token ids, or a list of either. Control tokens in a text are tokens.
    max_tokens: OpenAI's default of 16.
    logprobs: of this many most likely tokens at each place; not with `echo`.
    """

    model: str | None = None
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(min_length=1)]
    )
    n: int = Field(1, ge=1)
    max_tokens: int = 16
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: int | None = None

    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "suffix": (("",), "write the prompt in the model's own infilling form"),
        "use_beam_search": ((False,), "answers are sampled"),
        "length_penalty": ((1, 1.0), "it belongs to beam search"),
        "prompt_logprobs": ((), "use `logprobs` for those of the answer"),
        "skip_special_tokens": ((True,), "control tokens have no text"),
        "spaces_between_special_tokens": ((True,), "control tokens have no text"),
        "include_stop_str_in_output": ((False,), "the answer ends before it"),
        "truncate_prompt_tokens": ((), "shorten the prompt"),
        "prompt_embeds": ((), "give text or token ids"),
    }

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is given, but `stream` is not true; set it, too")
        if self.echo and self.logprobs is not None:
            raise ValueError("`echo` with `logprobs` is not supported; leave one of them out")
        if self.best_of not in (None, self.n):
            raise ValueError("`best_of` is not supported unless it equals `n`; leave it out")
        return self

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """defaults: see Sampling. Raises InputError naming an option that is out of range."""
        return self.sampling_params(defaults, max_tokens=self.max_tokens, logprobs=self.logprobs)

    def prompts(self) -> list[Prompt]:
        return [
            Prompt(text=each) if isinstance(each, str) else Prompt(token_ids=each)
            for each in self.each_prompt
        ]

    @property
    def each_prompt(self) -> list[str | list[int]]:
        """The prompts, where there is but one, too."""
        prompt: Any = self.prompt
        single = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if single else prompt


class CompletionLogprobs(BaseModel):
    """text_offset: where each token's text begins in the answer's."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: str | int | None = None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage
