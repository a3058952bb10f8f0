"""Summaries and ratios of figures, against values worked out by hand."""

from __future__ import annotations

import pytest

from glmcompile.bench.measures import MEASURES, growth, nested, ratios, summary


def test_summary_gives_median_and_spread() -> None:
    assert summary([5.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 5.0, "repeats": 3}
    with pytest.raises(ValueError, match="at least one"):
        summary([])


def test_a_ratio_above_one_is_better_for_times_rates_and_sizes() -> None:
    engine = {
        "ttft_ms": {"median": 10.0},
        "prefill_tokens_per_s": {"512": {"median": 300.0}},
        "throughput_tokens_per_s": {"4": {"median": 50.0}},
        "artifact_mb": 25.0,
    }
    baseline = {
        "ttft_ms": {"median": 40.0},
        "prefill_tokens_per_s": {"512": {"median": 100.0}},
        "throughput_tokens_per_s": {"4": {"median": 100.0}},
        "artifact_mb": 100.0,
    }
    assert ratios(engine, baseline) == {
        "ttft_ms": 4.0,
        "prefill_tokens_per_s": {"512": 3.0},
        "throughput_tokens_per_s": {"4": 0.5},
        "artifact_mb": 4.0,
    }


def test_work_that_engines_share_and_figures_of_one_alone_get_no_ratio() -> None:
    engine = {"import_ms": 1.0, "vision_encode_ms": 5.0}
    assert ratios(engine, {"import_ms": 2.0}) == {}


def test_growth_is_the_cost_of_a_token_at_the_longest_over_the_shortest() -> None:
    figures = {
        "decode_tokens_per_s.64": {"median": 100.0},
        "decode_tokens_per_s.1024": {"median": 80.0},
        "decode_tokens_per_s.4096": {"median": 50.0},
        "prefill_tokens_per_s.128": {"median": 100.0},
    }
    assert growth(figures) == {"decode_growth": 2.0}


def test_keys_with_points_nest() -> None:
    assert nested({"a.1": 2, "a.2": 3, "b": 4}) == {"a": {"1": 2, "2": 3}, "b": 4}


def test_keys_of_measures_are_distinct() -> None:
    assert len({measure.key for measure in MEASURES}) == len(MEASURES)
