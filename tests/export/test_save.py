"""Components share one weights file: aligned, without duplicates, the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from glmcompile.checkpoint import Checkpoint, open_checkpoint
from glmcompile.export import export_component, save_components
from tests.checkpoints import write_checkpoint

Exported = dict[str, ir.Model]
TABLE = "model.embed_tokens.weight"


def external(path: Path) -> dict[str, ir.ExternalTensor]:
    return {
        name: value.const_value
        for name, value in ir.load(path).graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def graph_of(**tensors: np.ndarray) -> ir.Model:
    values = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in tensors.items()
    ]
    for value, array in zip(values, tensors.values(), strict=True):
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    node = ir.node("Concat", values, {"axis": 0})
    return ir.Model(
        ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 23}),
        ir_version=10,
    )


def test_parameters_and_large_constants_lie_outside_page_aligned(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    save_components(exported("glm4v"), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "decoder.onnx",
        "vision_encoder.onnx",
        "weights.bin",
    ]
    for component, model in exported("glm4v").items():
        outside = external(tmp_path / f"{component}.onnx")
        for name, value in model.graph.initializers.items():
            assert value.const_value is not None
            lazy = isinstance(value.const_value, ir.LazyTensor)
            assert (name in outside) == (lazy or value.const_value.nbytes >= 1024)
        for tensor in outside.values():
            assert tensor.location == "weights.bin"
            assert tensor.offset is not None
            assert tensor.offset % (4096 if tensor.nbytes >= 4096 else 64) == 0
            np.testing.assert_array_equal(
                tensor.numpy(), model.graph.initializers[str(tensor.name)].const_value.numpy()
            )


def test_tied_embedding_is_stored_once(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    save_components(exported("llama"), tmp_path)
    graph = ir.load(tmp_path / "decoder.onnx").graph
    readers = [
        node.op_type
        for node in graph
        if any(value is not None and value.name == TABLE for value in node.inputs)
    ]
    assert sorted(readers) == ["Gather", "Linear"]
    assert "lm_head.weight" not in graph.initializers
    total = sum(t.nbytes for t in external(tmp_path / "decoder.onnx").values())
    assert (tmp_path / "weights.bin").stat().st_size < total + 4096 * 20


def test_equal_bytes_under_two_names_are_stored_once(tmp_path: Path) -> None:
    array = np.arange(4096, dtype=np.float32).reshape(64, 64)
    save_components({"a": graph_of(x=array, y=array + 1), "b": graph_of(z=array.copy())}, tmp_path)
    a, b = external(tmp_path / "a.onnx"), external(tmp_path / "b.onnx")
    assert a["x"].offset == b["z"].offset != a["y"].offset
    assert (tmp_path / "weights.bin").stat().st_size == 2 * array.nbytes


def test_models_are_unchanged_by_saving(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    model = exported("llama")["decoder"]
    before = model.graph.initializers[TABLE].const_value
    save_components({"decoder": model}, tmp_path)
    assert model.graph.initializers[TABLE].const_value is before


@pytest.mark.parametrize("component", ["vision_encoder", "decoder"])
def test_two_exports_give_identical_bytes(
    checkpoint_of: Callable[[str], Checkpoint],
    exported: Callable[[str], Exported],
    tmp_path: Path,
    component: str,
) -> None:
    again = export_component(checkpoint_of("qwen2_vl"), component)
    for run, model in enumerate((exported("qwen2_vl")[component], again)):
        save_components({component: model}, tmp_path / str(run))
    for file in (f"{component}.onnx", "weights.bin"):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()


def test_shards_export_to_the_bytes_of_one_file(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    sharded = write_checkpoint("llama", tmp_path / "sharded", max_shard_size="100KB")
    model = export_component(open_checkpoint(sharded), "decoder")
    save_components({"decoder": model}, tmp_path / "from_shards")
    save_components({"decoder": exported("llama")["decoder"]}, tmp_path / "from_one")
    for file in ("decoder.onnx", "weights.bin"):
        one, many = (tmp_path / d / file for d in ("from_one", "from_shards"))
        assert one.read_bytes() == many.read_bytes()
