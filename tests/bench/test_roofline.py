"""Operations and bytes against counts by hand; ceilings of each instruction set."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from glmcompile import bench
from glmcompile.artifact import open_artifact
from glmcompile.bench import compare
from glmcompile.bench.ceilings import Ceilings
from glmcompile.bench.machine import selected_isa
from glmcompile.bench.roofline import (
    TokenBytes,
    Traces,
    Work,
    decoder_work,
    growth_without_attention,
    linear_work,
    point,
    vision_work,
)
from glmcompile.bench.trace import Node
from glmcompile.cli import main
from glmcompile.errors import InputError
from tests.engines import TinyEngine
from tests.native.linear_reference import ISAS

Engines = Callable[..., TinyEngine]

TINY = compare.Plan(
    repeats=1,
    batch_repeats=1,
    long_repeats=1,
    footprint_repeats=1,
    answer_tokens=4,
    samples=9,
    texts=1,
    memory_buffer=1 << 20,
)


@pytest.fixture(scope="module")
def result(tiny_engine: Engines) -> dict[str, Any]:
    int8, fp32 = tiny_engine("glm4v", "int8").path, tiny_engine("glm4v").path
    return compare.run(int8, fp32, plan=TINY, threads=1, roofline=True)


@pytest.mark.parametrize("isa", ISAS)
def test_ceilings_are_positive_on_every_instruction_set(
    isa: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLMCOMPILE_ISA", isa)
    file = tmp_path / "weights"
    file.write_bytes(bytes(5000))
    with Ceilings(threads=2) as ceilings:
        assert ceilings.isa
        for figure in (
            ceilings.read_gb_per_s(1 << 16),
            ceilings.read_gb_per_s(1),
            ceilings.mapped_gb_per_s(file),
            ceilings.int8_gop_per_s(),
            ceilings.float32_gop_per_s(),
        ):
            assert math.isfinite(figure)
            assert figure > 0


def test_ceilings_are_those_of_the_linear_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMCOMPILE_ISA", "portable")
    with Ceilings(threads=1) as ceilings:
        assert ceilings.isa == "portable"


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_a_name_in_reports(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMCOMPILE_ISA", isa)
    assert selected_isa()


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMCOMPILE_ISA", "sse9")
    with pytest.raises(InputError, match="GLMCOMPILE_ISA is 'sse9'"):
        Ceilings(threads=1)


def test_linear_layers_count_two_operations_a_multiplication() -> None:
    # 5 tokens, 6 -> 40 features, stored padded to 48 and 64.
    packed = Node("LinearW8A8", 0.1, ((1, 5, 6), (3, 1, 16, 16, 4), (40,), (40,)), (1, 5, 20), 3392)
    plain = Node("FusedMatMul", 0.1, ((1, 5, 6), (7, 6)), (1, 5, 7), 0)
    other = Node("Add", 0.1, ((1, 5, 7), (7,)), (1, 5, 7), 28)
    assert linear_work([packed, plain, other]) == Work(
        2 * 5 * 6 * 40 + 2 * 5 * 6 * 7, 3392 + 4 * 6 * 7
    )


def test_vision_attention_is_all_to_all() -> None:
    attention = Node("VarlenAttention", 0.1, ((10, 8), (10, 8), (10, 8), (2,)), (10, 8), 0)
    # Scores and their product with the values: 10 x 10 x 8 multiply-accumulates each.
    assert vision_work([attention]).operations == 2 * 2 * 10 * 10 * 8


def test_a_decoders_work_by_hand(tiny_engine: Engines) -> None:
    model = open_artifact(tiny_engine("llama").path).model
    nodes = [Node("FusedMatMul", 0.1, ((1, 3, 4), (5, 4)), (1, 3, 5), 0)]
    token = TokenBytes(row=7, kv=11)
    # Three tokens after two see 3, 4 and 5 keys.
    layer = model.attention[0]
    assert layer.value_size == layer.head_size
    attention = 4 * len(model.attention) * layer.heads * layer.head_size * (3 + 4 + 5)
    assert decoder_work(nodes, model, token, tokens=3, past=2) == Work(
        2 * 3 * 4 * 5 + attention, 4 * 4 * 5 + 3 * 7 + 5 * 11
    )


@pytest.mark.parametrize(("precision", "size"), [("int8", 1), ("fp32", 4)])
def test_traces_of_an_engine_count_its_layers(
    tiny_engine: Engines, precision: str, size: int
) -> None:
    tiny = tiny_engine("llama", precision)
    config = json.loads((tiny.checkpoint / "config.json").read_text())
    hidden, inner, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    head = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * head
    traces = Traces(open_artifact(tiny.path), threads=1)
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    for tokens, runs in traces.decoder.items():
        assert len(runs) == 3
        for nodes in runs:
            # Behind the last attention, all there is to compute is the last token's logits.
            saved = (tokens - 1) * (hidden * hidden + 3 * hidden * inner)
            operations = 2 * (tokens * weights - saved + hidden * config["vocab_size"])
            assert linear_work(nodes).operations == operations
            stored = size * (weights + hidden * config["vocab_size"])
            # Scales and padding are the more, the smaller the layers are.
            assert stored <= linear_work(nodes).bytes < 3 * stored
    assert traces.token == TokenBytes(row=hidden * size, kv=layers * 2 * kv * size)
    assert traces.vision == []


def test_growth_of_a_prefill_leaves_attention_out() -> None:
    def run(linear: float, attention: float) -> list[Node]:
        shapes = ((1, 3, 4), (5, 4))
        return [
            Node("FusedMatMul", linear, shapes, (1, 3, 5), 0),
            Node("PagedAttention", attention, shapes, (1, 3, 5), 0),
        ]

    one, two, eight = ([run(*each)] * 3 for each in ((9.0, 1.0), (0.2, 9.0), (1.2, 99.0)))
    assert growth_without_attention({1: one, 2: two, 8: eight}) == pytest.approx(1.5)
    assert growth_without_attention({1: one, 2: two}) is None


def test_a_point_is_put_against_both_ceilings() -> None:
    # 2 GOP and 0.5 GB in 10 ms.
    work = Work(operations=2 * 10**9, bytes=5 * 10**8)
    found = point("decode", "context 64", work, 10.0, peak=400.0, bandwidth=100.0)
    assert (found.gop_per_s, found.gb_per_s) == pytest.approx((200, 50))
    assert (found.of_peak, found.of_bandwidth, found.intensity) == pytest.approx((0.5, 0.5, 4))


def test_both_engines_have_their_points_and_the_peak_of_their_type(result: dict[str, Any]) -> None:
    roofline = result["roofline"]
    assert json.loads(json.dumps(roofline)) == roofline
    assert {name: each["peak"] for name, each in roofline["engines"].items()} == {
        "int8": "int8",
        "fp32": "float32",
    }
    for engine in roofline["engines"].values():
        shown = {(each["kind"], each["size"]) for each in engine["points"]}
        assert shown >= {
            ("decode", "context 64"),
            ("decode", "context 1,024"),
            ("prefill", "512 tokens"),
            ("linear layers", "512 tokens"),
            ("vision", "1080x2400"),
        }
        assert all(each["gop_per_s"] > 0 and each["of_peak"] > 0 for each in engine["points"])


def test_every_point_is_a_line_in_both_tables(result: dict[str, Any]) -> None:
    points = [p for each in result["roofline"]["engines"].values() for p in each["points"]]
    assert bench.render_roofline(result).row_count == len(points)
    text = bench.render_markdown(result)
    assert text.count("| prefill, 512 tokens |") == 2
    assert "GB/s from memory" in text


def test_the_command_writes_figures_and_picture_of_one_engine(
    tiny_engine: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "QUICK", TINY)
    figures, picture = tmp_path / "figures.json", tmp_path / "roofline.png"
    options = ["--quick", "--roofline", "--threads", "1", "--json", figures, "--plot", picture]
    arguments = ["bench", tiny_engine("llama", "int8").path, *options]
    run = CliRunner().invoke(main, [str(each) for each in arguments])
    assert run.exit_code == 0, run.output
    assert "of bandwidth" in run.stdout
    roofline = json.loads(figures.read_text())["roofline"]
    assert roofline["memory_gb_per_s"] > 0
    assert [each["kind"] for each in roofline["engines"]["int8"]["points"]].count("decode") == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
