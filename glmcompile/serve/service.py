"""What routes share: the engine, its limits, and how an HTTP request becomes requests of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request as HttpRequest

from glmcompile.errors import InputError
from glmcompile.runtime.engine import Engine
from glmcompile.runtime.input_processor import Prompt
from glmcompile.runtime.sampling_params import SamplingParams
from glmcompile.serve.answer_form import AnswerForms
from glmcompile.serve.errors import ApiError, draining
from glmcompile.serve.exchange import Exchange
from glmcompile.serve.preparation import Preparation
from glmcompile.serve.protocol.common import SEED_RANGE, Sampling
from glmcompile.serve.settings import ServerSettings
from glmcompile.serve.tokens import TokenTexts


class Service:
    """One engine, served."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        """engine: open; whoever opened it closes it."""
        self.engine, self.settings = engine, settings
        self.texts = TokenTexts(engine.prompts.tokenizer)
        self.preparation = Preparation(engine, settings.workers, engine.options.capacity)
        # Engines of before have no such entry.
        self.defaults: dict[str, Any] = engine.manifest.get("sampling", {})
        self.forms = AnswerForms(engine.prompts, split_reasoning=settings.split_reasoning)
        self.started = int(time.time())
        # Set once the server is told to stop; what runs is finished, nothing new is taken.
        self.draining = False

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises ApiError 404 for a model that is not here."""
        names = self.settings.model_names
        if asked is None:
            return names[0]
        if asked not in names:
            raise ApiError(
                404,
                f"no model {asked!r} here; there is {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return asked

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its answer together."""
        return self.engine.context_length

    async def begin(
        self,
        http: HttpRequest,
        body: Sampling,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        n: int = 1,
        streamed: bool = False,
        shown: Sequence[str] = (),
    ) -> Exchange:
        """Prepare and submit n answers to each prompt; the caller closes the exchange.

        shown: special tokens that stand in the answers' text.
        With a seed, the answers of a prompt take it and the numbers that follow.
        Raises InputError, OverloadedError, ClosedError, ApiError and ClientGoneError.
        """
        if self.draining:
            raise draining()
        self.engine.check_room()
        if len(prompts) * n > self.settings.max_choices:
            raise InputError(
                f"{len(prompts)} prompts with n={n} make {len(prompts) * n} answers; "
                f"at most {self.settings.max_choices} are given at once"
            )
        exchange = Exchange(self.engine, http.receive, streamed=streamed)
        http.state.exchange = exchange
        try:
            samplings = [_seeded(params, place) for place in range(n)]
            groups = [
                await self.preparation.prepare(
                    prompt,
                    samplings,
                    policy=self.settings.policy,
                    shown=shown,
                    priority=body.priority,
                    timeout=body.timeout,
                )
                for prompt in prompts
            ]
            exchange.submit(groups)
        except BaseException:
            exchange.close()
            raise
        return exchange


def _seeded(params: SamplingParams, place: int) -> SamplingParams:
    if params.seed is None or place == 0:
        return params
    return replace(params, seed=(params.seed + place) % SEED_RANGE)
