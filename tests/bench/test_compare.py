"""A whole benchmark of tiny engines: its structure, and that its figures fit together."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from glmcompile import bench
from glmcompile.bench import compare
from glmcompile.bench.measures import MEASURES
from glmcompile.errors import GlmcompileError, InputError
from tests.engines import TinyEngine

Engines = Callable[..., TinyEngine]

TINY = compare.Plan(
    repeats=2,
    batch_repeats=1,
    long_repeats=1,
    footprint_repeats=1,
    answer_tokens=4,
    samples=9,
    texts=2,
)
# The tiny models' context has 2,048 tokens; the roofline's measures are tested on their own.
TOO_LONG = {"prefill_tokens_per_s.2048", "decode_tokens_per_s.4096", "phone_screen_encode_ms"}


@pytest.fixture(scope="module")
def result(tiny_engine: Engines) -> dict[str, Any]:
    int8, fp32 = tiny_engine("glm4v", "int8").path, tiny_engine("glm4v").path
    return compare.run(int8, fp32, plan=TINY, threads=1)


@pytest.fixture(scope="module")
def alone(tiny_engine: Engines) -> dict[str, Any]:
    return compare.run(tiny_engine("llama", "int8").path, plan=TINY, threads=1)


def test_a_comparison_has_five_parts_that_json_can_hold(result: dict[str, Any]) -> None:
    assert list(result) == ["fp32", "int8", "ratio", "accuracy", "machine"]
    assert json.loads(json.dumps(result)) == result


def test_both_engines_have_every_measure(result: dict[str, Any]) -> None:
    for measure in MEASURES:
        for name in ("fp32", "int8"):
            value = measure.value(result[name])
            assert (value is None) == (measure.key in TOO_LONG), measure.key
            assert value is None or value > 0, measure.key
    assert result["int8"]["ttft_ms"]["repeats"] == 2
    assert result["int8"]["ttft_ms"]["min"] <= result["int8"]["ttft_ms"]["max"]


def test_figures_of_one_engine_fit_together(result: dict[str, Any]) -> None:
    for name in ("fp32", "int8"):
        figures = result[name]
        assert figures["vision_encode_ms"]["min"] < figures["ttft_ms"]["max"]
        assert 10 < figures["peak_memory_mb"]["median"] < 1000
        assert 0 < figures["decode_python_percent"]["64"]["median"] < 100
        assert figures["decode_growth"] == pytest.approx(
            figures["decode_tokens_per_s"]["64"]["median"]
            / figures["decode_tokens_per_s"]["1024"]["median"]
        )


def test_the_smaller_engine_has_the_size_of_its_files(
    result: dict[str, Any], tiny_engine: Engines
) -> None:
    files = [f for f in tiny_engine("glm4v", "int8").path.iterdir() if f.name != "manifest.json"]
    size = sum(file.stat().st_size for file in files) / 1e6
    assert result["int8"]["artifact_mb"] == pytest.approx(size)
    assert result["ratio"]["artifact_mb"] > 1


def test_the_machine_is_described(result: dict[str, Any]) -> None:
    machine = result["machine"]
    assert machine["threads"] == 1
    assert machine["isa"] in ("portable", "neon", "avx2", "avx512", "avx512_bf16", "amx")
    assert machine["versions"]["onnxruntime"]


def test_an_engine_alone_has_neither_baseline_nor_ratio(alone: dict[str, Any]) -> None:
    assert list(alone) == ["int8", "accuracy", "machine"]
    assert "vision_encode_ms" not in alone["int8"]
    assert alone["accuracy"]["teacher_forcing"]["perplexity"]["int8"] > 1


def test_markdown_is_one_table_with_a_row_a_measure(result: dict[str, Any]) -> None:
    text = bench.render_markdown(result)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "|  | FP32 | INT8 | INT8 is better by |"
    assert {line.replace("\\|", "").count("|") for line in table} == {5}
    assert len(table) == 2 + len(MEASURES) - len(TOO_LONG) + 4
    assert "Newcombe" in text


def test_tables_of_comparisons_and_single_engines_render(
    result: dict[str, Any], alone: dict[str, Any]
) -> None:
    for each, columns in ((result, 4), (alone, 2)):
        table = bench.render_table(each)
        assert len(table.columns) == columns
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(table)
        assert "time to first token" in console.export_text()


def test_a_plot_is_a_png(result: dict[str, Any], tmp_path: Path) -> None:
    bench.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_one_engine_alone_is_not_plotted(alone: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no baseline and no roofline"):
        bench.plot(alone, tmp_path / "plot.png")


def test_engines_of_different_checkpoints_are_not_compared(tiny_engine: Engines) -> None:
    with pytest.raises(InputError, match="different checkpoints"):
        compare.run(tiny_engine("llama", "int8").path, tiny_engine("glm4v").path, plan=TINY)


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    from glmcompile.bench import footprint

    with pytest.raises(GlmcompileError, match="no such engine directory"):
        footprint.measure(tmp_path / "nothing", 1, 4, None)


def test_importing_the_benchmark_loads_no_runtime() -> None:
    code = "import sys, glmcompile.bench; print('onnxruntime' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
