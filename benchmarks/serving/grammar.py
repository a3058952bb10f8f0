"""What forced tokens save: an agent's action with its grammar, and the same without forcing."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import glmcompile
from glmcompile.runtime.grammar import Grammar

ACTION = r'do\(action="(Tap|Long Press|Double Tap)", element=\[[0-9]{3},[0-9]{3}\]\)'


def measure(engine: Path, repetitions: int) -> dict[str, Any]:
    """The same answer twice: with log-probabilities asked for, no token is forced."""
    figures: dict[str, list[float]] = {"forced": [], "computed": []}
    with glmcompile.load(engine) as loaded:
        for repetition in range(-1, repetitions):
            for name, options in (("forced", {}), ("computed", {"logprobs": 0})):
                before = loaded.stats().steps
                done = loaded.generate(
                    prompt=f"{name}{repetition}: tap the button",
                    grammar=Grammar.regex(ACTION),
                    max_tokens=64,
                    **options,
                )
                steps = loaded.stats().steps - before
                if repetition >= 0:
                    figures[name].append(done.timings.total - done.timings.ttft)
        tokens = len(done.token_ids)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    with glmcompile.load(engine) as loaded:
        done = loaded.generate(prompt="x", grammar=Grammar.regex(ACTION), max_tokens=64)
        forced_steps = loaded.stats().steps
    return {
        "answer_tokens": tokens,
        "steps_forced": forced_steps,
        "steps_computed": steps,
        "decode_ms": {name: 1e3 * value for name, value in medians.items()},
        "speedup": medians["computed"] / medians["forced"],
    }
