"""What the requests of all routes share: strict types, sampling options, token counts.

A field is one of three: it does what its documentation says; it changes no answer and is accepted
(`Harmless`); or it is refused, with status 400 and its name, also where no OpenAI server knows it.
So nothing that a client asks for is ignored in silence. A null is a field left out, as clients
write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.json_schema import SkipJsonSchema

from glmcompile.errors import InputError
from glmcompile.runtime.grammar import Grammar
from glmcompile.runtime.request import Usage
from glmcompile.runtime.sampling_params import SamplingParams

# Each is compared with the answer's end at every token.
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = StopString | Annotated[list[StopString], Field(max_length=16)]

SEED_RANGE = 2**64


class Body(BaseModel):
    """A request's body. Numbers are not read from strings, nor booleans from numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # Fields that would change the answer and are not supported: name -> (values that ask for
    # nothing, what to do).
    refused: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_and_refused(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("expected a JSON object")
        given = {name: value for name, value in body.items() if value is not None}
        for name in cls.refused.keys() & given.keys():
            accepted, advice = cls.refused[name]
            if given[name] not in accepted:
                raise ValueError(f"`{name}` is not supported; {advice}")
            del given[name]
        return given


class Harmless(Body):
    """Fields for the books of a provider, or hints to one; they change no answer."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None


class Sampling(Body):
    """How the answer's tokens are chosen; ranges are those of SamplingParams.

    temperature, top_p, top_k, min_p, repetition_penalty: default to the engine's own, taken from
    the checkpoint's generation_config.json, and without one to OpenAI's (temperature 1, no cuts).
    top_k: 0 or -1 means all. logit_bias: token id -> added to its logit.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="The lower, the sooner.")
    timeout: float | None = Field(None, gt=0, description="Seconds, after which work stops.")

    def sampling_params(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """Raises InputError naming the option that is out of range."""
        options: dict[str, Any] = {"temperature": 1.0, **defaults}
        for name in _PLAIN_OPTIONS:
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if options.get("top_k") == -1:
            options["top_k"] = 0
        if self.seed is not None:  # OpenAI's may be negative
            options["seed"] = self.seed % SEED_RANGE
        if self.logit_bias:
            options["logit_bias"] = _by_token(self.logit_bias)
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, grammar=grammar, **options)


_PLAIN_OPTIONS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
)


def _by_token(bias: Mapping[str, float]) -> dict[int, float]:
    """JSON's names are strings, OpenAI's of this field token ids."""
    if wrong := next((name for name in bias if not name.isascii() or not name.isdigit()), None):
        raise InputError(f"logit_bias: {wrong!r} is not a token id")
    return {int(name): value for name, value in bias.items()}


class StreamOptions(Body):
    """include_usage: token counts in a last chunk; continuous_usage_stats: in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: SkipJsonSchema[bool | None] = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    image_tokens: int


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class TokenUsage(BaseModel):
    """Token counts of all answers of a request; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


def token_usage(
    usages: Sequence[Usage], per_prompt: int = 1, reasoning_tokens: int = 0
) -> TokenUsage:
    """Counts of all answers. usages: prompt by prompt, `per_prompt` answers of each."""
    prompts = usages[::per_prompt]
    prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return TokenUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(usage.cached_tokens for usage in prompts),
            image_tokens=sum(usage.image_tokens for usage in prompts),
        ),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning_tokens),
    )
