"""Lowered float32 graphs compute what transformers computes; a difference is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from glmcompile.checkpoint import Checkpoint, open_checkpoint
from glmcompile.errors import ParityError
from glmcompile.export.parity import check_parity, compare
from glmcompile.export.reference import default_samples
from glmcompile.targets.cpu import open_session


def test_every_component_equals_transformers(
    checkpoint_of: Callable[[str], Checkpoint], lowered: Callable[[str], Path], family_name: str
) -> None:
    checkpoint = checkpoint_of(family_name)
    report = check_parity(checkpoint, lowered(family_name))
    outputs = [(d.component, d.output) for d in report.differences]
    vision = [("vision_encoder", "image_features")] if checkpoint.model.vision else []
    assert outputs == [
        *vision,
        ("embedding", "inputs_embeds"),
        ("decoder", "logits"),
        ("decoder", "logits (in chunks)"),
    ]
    assert all(d.max_error < 2e-5 for d in report.differences)


@pytest.mark.parametrize("family_name", ["glm4v", "qwen2_vl"])
def test_samples_cover_several_images_of_different_sizes(
    checkpoint_of: Callable[[str], Checkpoint], family_name: str
) -> None:
    samples = default_samples(checkpoint_of(family_name))
    assert [len(sample.grid_thw) for sample in samples] == [2, 1, 0]
    grids = np.concatenate([sample.grid_thw for sample in samples])
    assert len({tuple(grid) for grid in grids}) == 3


def test_embedding_takes_no_image_at_all(
    checkpoint_of: Callable[[str], Checkpoint], lowered: Callable[[str], Path]
) -> None:
    session = open_session(lowered("glm4v") / "embedding.onnx")
    ids = np.array([5, 6, 7])
    feeds = {
        "input_ids": ids,
        "image_features": np.empty((0, 128), np.float32),
        "image_token_indices": np.empty(0, np.int64),
    }
    [embeds] = session.run(None, feeds)
    table = checkpoint_of("glm4v").tensor("model.language_model.embed_tokens.weight")
    np.testing.assert_array_equal(embeds, table.float().numpy()[ids])


@pytest.mark.parametrize(
    ("component", "weight"),
    [
        ("vision_encoder", "model.visual.blocks.1.attn.proj.weight"),
        ("embedding", "model.language_model.embed_tokens.weight"),
        ("decoder", "model.language_model.layers.1.self_attn.o_proj.weight"),
    ],
)
def test_a_wrong_weight_is_blamed_on_its_component(
    checkpoint_of: Callable[[str], Checkpoint],
    lowered: Callable[[str], Path],
    tmp_path: Path,
    component: str,
    weight: str,
) -> None:
    directory = shutil.copytree(lowered("glm4v"), tmp_path / "graphs")
    tensor = ir.load(directory / f"{component}.onnx").graph.initializers[weight].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with (directory / "weights.bin").open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(np.full(tensor.size // 2, 0.1, np.float32).tobytes())
    with pytest.raises(ParityError, match=rf"^{component}: .*worst at \[\d+, \d+\]"):
        check_parity(checkpoint_of("glm4v"), directory)


def test_untied_and_tied_heads_both_hold(tmp_path: Path, checkpoint_of: object) -> None:
    from glmcompile.export import export_component, save_components
    from glmcompile.targets.cpu.lower import lower
    from tests.checkpoints import write_checkpoint

    checkpoint = open_checkpoint(write_checkpoint("llama", tmp_path / "c", tied=False))
    assert checkpoint.tied == {}
    models = {name: export_component(checkpoint, name) for name in checkpoint.family.components}
    assert "lm_head.weight" in models["decoder"].graph.initializers
    for model in models.values():
        lower(model)
    save_components(models, tmp_path / "graphs")
    assert check_parity(checkpoint, tmp_path / "graphs").differences


def test_compare_finds_the_largest_error_and_values_that_are_no_numbers() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    actual = expected.copy()
    actual[1, 0] = 0.5
    difference = compare("decoder", "logits", expected, actual)
    assert difference.where == (1, 0)
    assert difference.max_error == pytest.approx(0.5 / 2.5)
    assert difference.mean_error == pytest.approx(0.5 / 4 / 2.5)
    actual[0, 1] = np.nan
    worst = compare("decoder", "logits", expected, actual)
    assert worst.where == (0, 1)
    assert not worst.within_tolerance


def test_compare_refuses_another_shape() -> None:
    with pytest.raises(ParityError, match=r"logits has shape \[1, 2\]; torch gives \[2, 1\]"):
        compare("decoder", "logits", np.ones((2, 1), np.float32), np.ones((1, 2), np.float32))
