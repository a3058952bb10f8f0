"""Faults made on purpose, so that tests see what an engine and its server do about real ones.

A specification is `place:what[@share]`, several joined by commas: place is `decoder` (a step),
`encoder` (an image) or `tokenizer` (a prompt); what is `error` or a delay such as `200ms`; share is
the part of the calls that it hits, 1 unless given. `decoder:error@0.02,encoder:500ms` fails one
step in fifty and slows every image down. Which calls are hit is random but the same in every run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from glmcompile.errors import InputError
from glmcompile.runtime.encoder import ImageEncoder
from glmcompile.runtime.input_processor import InputProcessor
from glmcompile.runtime.model_runner import ModelRunner

_FAULT = re.compile(
    r"(?P<place>decoder|encoder|tokenizer):(?:(?P<error>error)|(?P<ms>\d+)ms)"
    r"(?:@(?P<share>0?\.\d+|[01](?:\.0*)?))?"
)


class InjectedFaultError(RuntimeError):
    """What a fault raises."""


@dataclass(frozen=True)
class Fault:
    """delay: seconds, or None for an error."""

    place: str
    delay: float | None
    share: float


@dataclass(frozen=True)
class Faults:
    faults: tuple[Fault, ...] = ()

    @classmethod
    def parse(cls, specification: str) -> Faults:
        """Raises InputError naming the part that is not a fault."""
        faults = []
        for part in filter(None, specification.split(",")):
            match = _FAULT.fullmatch(part.strip())
            if match is None:
                raise InputError(
                    f"faults: {part!r} is not place:what[@share], such as decoder:error@0.02 "
                    "or encoder:500ms"
                )
            delay = None if match["error"] else int(match["ms"]) / 1e3
            faults.append(Fault(match["place"], delay, float(match["share"] or 1)))
        return cls(tuple(faults))

    def inject(
        self, runner: ModelRunner, encoder: ImageEncoder | None, inputs: InputProcessor
    ) -> None:
        """Put the faults before the calls they hit; without any, nothing is touched."""
        targets: dict[str, tuple[Any, str]] = {
            "decoder": (runner, "run"),
            "tokenizer": (inputs.prompts, "encode"),
        }
        if encoder is not None:
            targets["encoder"] = (encoder, "encode")
        for number, fault in enumerate(self.faults):
            if fault.place not in targets:
                raise InputError(f"faults: a text model has no {fault.place}")
            owner, name = targets[fault.place]
            setattr(owner, name, _faulty(getattr(owner, name), fault, Random(number)))


def _faulty(call: Callable[..., Any], fault: Fault, random: Random) -> Callable[..., Any]:
    def faulty(*arguments: Any, **options: Any) -> Any:
        if random.random() < fault.share:
            if fault.delay is None:
                raise InjectedFaultError(f"a fault injected into the {fault.place}")
            time.sleep(fault.delay)
        return call(*arguments, **options)

    return faulty
