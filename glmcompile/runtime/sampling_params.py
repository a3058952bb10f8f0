"""The options of one answer: how its tokens are chosen and when it ends, checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from glmcompile.errors import InputError
from glmcompile.runtime.grammar import Grammar

# Logits divided by less could overflow; vLLM draws the same line.
_GREEDY_BELOW = 1e-5
_LARGEST_BIAS = 100.0  # OpenAI's


@dataclass(frozen=True)
class SamplingParams:
    """How an answer's tokens are chosen and when it ends.

    max_tokens: None means as many as context and cache hold.
    min_tokens: no end-of-sequence or stop token before this many.
    temperature: 0 takes the most likely token (greedy), and so does anything below 1e-5.
    top_k: sample among the k most likely tokens; 0 means all.
    top_p: sample among the most likely tokens whose probabilities reach this sum.
    min_p: drop tokens less likely than this share of the most likely one's probability, last.
    repetition_penalty: > 1 discourages every token of prompt and answer (CTRL, Keskar et al. 2019).
    frequency_penalty, presence_penalty: subtracted per occurrence, or once, in the answer (OpenAI).
    seed: the same seed gives the same answer, whatever else runs; None draws one.
    stop: the answer ends before the first of these strings.
    stop_token_ids: the answer ends at any of these tokens, besides the model's own.
    ignore_eos: go on past the model's own end-of-sequence tokens.
    logprobs: also report this many most likely tokens per position, and the chosen one.
    logit_bias: token id to a number of -100 to 100 that is added to its logit (OpenAI).
    grammar: the form that the answer must have. It ends at the model's end tokens, which come when
        the form allows it and not before; one cut short by max_tokens is the beginning of a valid
        answer. Where logprobs are wanted, every token is computed, forced ones too.
    Raises InputError naming the option that is out of range.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._integer("max_tokens", 1, optional=True)
        self._integer("min_tokens", 0)
        self._integer("top_k", 0)
        self._integer("seed", 0, optional=True)
        self._integer("logprobs", 0, optional=True)
        self._number("temperature", 0.0, math.inf)
        if self.temperature < _GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, math.inf, open_low=True)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("presence_penalty", -2.0, 2.0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}; "
                "min_tokens must not be the larger"
            )
        if not all(isinstance(item, str) and item for item in stop):
            raise InputError(f"stop is {self.stop!r}; expected strings that are not empty")
        if not all(isinstance(item, int) and item >= 0 for item in self.stop_token_ids):
            raise InputError(f"stop_token_ids is {self.stop_token_ids!r}; expected token ids")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if not isinstance(self.grammar, Grammar | None):
            raise InputError(f"grammar is {self.grammar!r}; expected a Grammar")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> SamplingParams:
        """Raises InputError naming an option that does not exist."""
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                raise InputError(f"no sampling option {name!r}; there are {', '.join(known)}")
        return cls(**options)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises InputError naming an option with a token id that the model does not have."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for id in ids or ():
                if id >= vocab_size:
                    raise InputError(
                        f"{name} has token id {id}; the vocabulary has {vocab_size} tokens"
                    )

    def _integer(self, name: str, low: int, optional: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
            raise InputError(f"{name} is {value!r}; expected an integer of at least {low}")
        object.__setattr__(self, name, int(value))

    def _number(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if (
            not number
            or not math.isfinite(value)
            or not low <= value <= high
            or (open_low and value == low)
        ):
            above = "above" if open_low else "of at least"
            below = "" if high == math.inf else f" and at most {high:g}"
            raise InputError(f"{name} is {value!r}; expected a number {above} {low:g}{below}")
        object.__setattr__(self, name, float(value))


def _checked_bias(bias: Any) -> dict[int, float]:
    """With integers for keys, which JSON can only write as strings."""
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias is {bias!r}; expected a mapping of token ids to numbers")
    checked = {}
    for key, value in bias.items():
        id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        if not isinstance(id, numbers.Integral) or isinstance(id, bool) or id < 0:
            raise InputError(f"logit_bias has the key {key!r}; expected a token id")
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not abs(value) <= _LARGEST_BIAS:
            raise InputError(
                f"logit_bias has {value!r} for token {key}; expected a number of at least "
                f"{-_LARGEST_BIAS:g} and at most {_LARGEST_BIAS:g}"
            )
        checked[int(id)] = float(value)
    return checked
