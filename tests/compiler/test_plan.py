"""What is planned: sizes by arithmetic, against the engines themselves; refusals with figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from glmcompile.artifact import open_artifact
from glmcompile.calibrate.samples import recipe_samples
from glmcompile.checkpoint import open_checkpoint
from glmcompile.cli import main
from glmcompile.compiler import needs
from glmcompile.compiler.geometry import MERGED, PATCH, SAMPLED, TOKEN, geometry
from glmcompile.errors import ArtifactError
from glmcompile.quantize.schemes import load_recipe
from tests.engines import TinyEngine


def stored_bytes(engine: Path) -> int:
    """Of all tensors in weights.bin, each counted once, without what aligns them."""
    places = {}
    for component in open_artifact(engine, verify=False).components:
        model = onnx.load(engine / f"{component}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                places[where["offset"]] = int(where["length"])
    return sum(places.values())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_has_the_size_that_is_planned(
    tiny_engine: Callable[..., TinyEngine], family_name: str, precision: str
) -> None:
    tiny = tiny_engine(family_name, precision)
    planned = geometry(open_checkpoint(tiny.checkpoint)).engine_bytes(precision)
    # Scales of the cache and of the norms' inputs are left out; they count in a model this small.
    assert planned == pytest.approx(stored_bytes(tiny.path), rel=0.04)


def test_operations_are_counted_by_what_a_weight_is_multiplied_with(
    checkpoint_of: Callable,
) -> None:
    shapes = geometry(checkpoint_of("glm4v"))
    rows = {PATCH: 5, MERGED: 3, TOKEN: 2, SAMPLED: 1}
    alone = [shapes.operations({kind: count}) for kind, count in rows.items()]
    assert all(count > 0 for count in alone)
    assert shapes.operations(rows) == sum(alone)
    assert shapes.operations({SAMPLED: 1}) == 2 * 128 * 288
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 192
    assert shapes.operations({TOKEN: 1}) == 2 * 2 * layer
    assert shapes.layers == shapes.vision_layers == 2


@pytest.fixture
def invoke() -> Callable:
    return lambda *words: CliRunner().invoke(main, ["plan", *map(str, words)])


def test_the_command_says_what_each_precision_needs(
    invoke: Callable, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    result = invoke(tiny_checkpoint("glm4v"), "--image", "140x280", "--json", file)
    assert result.exit_code == 0, result.output
    for title in ("time to compile", "memory to serve", "TTFT", "TPOT", "fits into"):
        assert title in result.output
    found = json.loads(file.read_text())
    assert set(found["precisions"]) == {"fp32", "int8"}
    int8, fp32 = (found["precisions"][name] for name in ("int8", "fp32"))
    assert int8["space"]["engine"] < 0.5 * fp32["space"]["engine"]
    assert int8["space"]["kv"] * 4 == fp32["space"]["kv"]


def test_what_fits_nowhere_is_refused_with_the_figures(
    invoke: Callable, tiny_checkpoint: Callable[[str], Path]
) -> None:
    result = invoke(tiny_checkpoint("llama"), "--memory", "100MB")
    assert result.exit_code == 2
    assert "no precision fits into 0.1 GB of memory" in result.stderr
    assert "to compile" in result.stderr


@pytest.mark.parametrize("size", ["1080", "0x10", "axb"])
def test_a_size_that_is_none_is_refused(
    invoke: Callable, tiny_checkpoint: Callable[[str], Path], size: str
) -> None:
    result = invoke(tiny_checkpoint("llama"), "--image", size)
    assert result.exit_code == 2
    assert "WIDTHxHEIGHT" in result.stderr


def test_too_little_memory_is_an_error_before_compiling(
    checkpoint_of: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, recipe = checkpoint_of("llama"), load_recipe()
    load = needs.load_of(checkpoint, recipe, recipe_samples(checkpoint.model, recipe, None))
    monkeypatch.setattr(needs, "available_memory", lambda: 50_000_000)
    with pytest.raises(
        ArtifactError, match=r"needs 0\.\d GB of memory, but 50\.0 MB are available"
    ):
        needs.check_resources(
            checkpoint, geometry(checkpoint), "int8", load, tmp_path / "new" / "engine"
        )
