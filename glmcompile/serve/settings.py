"""How the server answers, apart from what the engine itself is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from glmcompile.errors import InputError
from glmcompile.runtime.media import SERVED, InputPolicy


@dataclass(frozen=True)
class ServerSettings:
    """Limits are on unless raised; nothing here is read again after the start.

    model_names: what clients may give as `model`; answers carry the first.
    api_key: required as a bearer token on every route that computes or describes; None: open.
    max_body: bytes of one request's body.
    max_choices: answers of one request (`n` times the prompts of a batch).
    grace: seconds that running requests have once the server is told to stop.
    cors_origins: web origins whose pages may call the server; none by default.
    split_reasoning: give thinking apart in every answer, not only where a request asks for it.
    policy: what a request may hold, and where its images may come from.
    access_log: one line of JSON per request into this file, "-" for stderr; None: no log.
    workers: threads that decode images and tokenize.
    """

    model_names: tuple[str, ...]
    api_key: str | None = field(default=None, repr=False)
    max_body: int = 64 << 20
    max_choices: int = 128
    grace: float = 30.0
    cors_origins: tuple[str, ...] = ()
    split_reasoning: bool = False
    policy: InputPolicy = SERVED
    access_log: Path | str | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        if not self.model_names or not all(self.model_names):
            raise InputError("model_names is empty; give the model at least one name")
        if self.api_key is not None and not self.api_key:
            raise InputError("api_key is empty; give a key, or none to leave the server open")
        for name in ("max_body", "max_choices", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.grace < 0:
            raise InputError(f"grace is {self.grace}; expected seconds, 0 or more")
