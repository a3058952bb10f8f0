"""The catalogue of measures: keys in a result, titles, units and which direction is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

REQUESTS = (1, 4, 8, 16)
PREFILL_TOKENS = (128, 512, 2048)
CONTEXTS = (64, 1024, 4096)


@dataclass(frozen=True)
class Measure:
    """key: in results, "a.b" meaning result["a"]["b"]. digits: after the point when shown.

    compared: whether it gets a ratio; work that is the same for every engine does not.
    """

    key: str
    title: str
    unit: str
    higher_is_better: bool = False
    digits: int = 1
    compared: bool = True

    def value(self, figures: dict[str, Any]) -> float | None:
        """The median, or the single figure, in one engine's part of a result."""
        found: Any = figures
        for part in self.key.split("."):
            if part not in found:
                return None
            found = found[part]
        return float(found["median"] if isinstance(found, dict) else found)


MEASURES = (
    Measure("preprocess_ms", "image preprocessing", "ms", compared=False),
    Measure("vision_encode_ms", "vision encoding", "ms"),
    Measure("screenshot_prefill_tokens_per_s", "prefill, screenshot prompt", "tok/s", True, 0),
    Measure("phone_screen_encode_ms", "vision encoding, 1080x2400", "ms"),
    *(
        Measure(f"prefill_tokens_per_s.{tokens}", f"prefill, {tokens:,} tokens", "tok/s", True, 0)
        for tokens in PREFILL_TOKENS
    ),
    Measure("ttft_ms", "time to first token (TTFT)", "ms"),
    Measure("tpot_ms", "time per output token (TPOT)", "ms", digits=2),
    *(
        Measure(f"decode_tokens_per_s.{context}", f"decode, context {context:,}", "tok/s", True)
        for context in CONTEXTS
    ),
    Measure(
        f"decode_python_percent.{CONTEXTS[0]}",
        f"Python's share of a step, context {CONTEXTS[0]}",
        "%",
        compared=False,
    ),
    *(
        Measure(
            f"{kind}_growth",
            f"{kind} time per token, longest / shortest",
            "x",
            digits=2,
            compared=False,
        )
        for kind in ("prefill", "decode")
    ),
    *(
        Measure(
            f"throughput_tokens_per_s.{count}",
            f"throughput, {count} request{'s' if count > 1 else ''}",
            "output tok/s",
            True,
        )
        for count in REQUESTS
    ),
    Measure("peak_memory_mb", "peak memory", "MB", digits=0),
    Measure("artifact_mb", "engine size", "MB"),
    Measure("load_ms", "load time", "ms", digits=0),
    Measure("import_ms", "import time before that", "ms", digits=0, compared=False),
)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread of repetitions. Raises ValueError without any."""
    if not values:
        raise ValueError("a summary needs at least one measurement")
    return {
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "repeats": len(values),
    }


def growth(figures: dict[str, Any]) -> dict[str, float]:
    """What a token costs in the longest prefill and context measured, over the shortest."""
    found = {}
    for kind, sizes in (("prefill", PREFILL_TOKENS), ("decode", CONTEXTS)):
        keys = [key for size in sizes if (key := f"{kind}_tokens_per_s.{size}") in figures]
        if len(keys) > 1:
            found[f"{kind}_growth"] = figures[keys[0]]["median"] / figures[keys[-1]]["median"]
    return found


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return result


def ratios(engine: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """How many times better the engine is than the baseline, measure by measure.

    Above 1 is always better: rates are engine / baseline, times and sizes baseline / engine.
    """
    return nested(dict(_ratios(engine, baseline)))


def _ratios(engine: dict[str, Any], baseline: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for measure in MEASURES:
        ours, theirs = measure.value(engine), measure.value(baseline)
        if not measure.compared or not ours or not theirs:
            continue
        yield measure.key, ours / theirs if measure.higher_is_better else theirs / ours
