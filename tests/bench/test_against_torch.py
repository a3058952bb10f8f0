"""An engine against its checkpoint's torch modules: the errors, what is said of them, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from glmcompile.bench import compare, render_markdown
from glmcompile.checkpoint import open_checkpoint
from glmcompile.cli import main
from glmcompile.errors import InputError
from glmcompile.evaluate.against_torch import compare_with_torch, predictions
from glmcompile.evaluate.samples import EvaluationSample, evaluation_samples
from glmcompile.progress import Silent
from glmcompile.runtime.engine import Engine
from tests.bench.test_compare import TINY
from tests.engines import TinyEngine

Engines = Callable[..., TinyEngine]


def compared(tiny: TinyEngine, samples: list[EvaluationSample] | None = None) -> dict[str, Any]:
    with Engine(tiny.path) as engine:
        samples = samples or evaluation_samples(engine.model, None, 3)
        source = open_checkpoint(tiny.checkpoint)
        return compare_with_torch(engine, source, samples, Silent())


def test_a_float32_engine_gives_what_torch_gives(tiny_engine: Engines, family_name: str) -> None:
    found = compared(tiny_engine(family_name))
    outputs = {"logits"} if family_name == "llama" else {"image_features", "logits"}
    assert set(found["relative_error"]) == outputs
    assert all(error < 5e-6 for error in found["relative_error"].values())  # 1.2e-6 is seen


def test_an_int8_engine_has_an_error(tiny_engine: Engines) -> None:
    found = compared(tiny_engine("glm4v", "int8"))
    assert found["samples"] == 3
    assert all(1e-3 < error < 0.1 for error in found["relative_error"].values())  # 0.03 is seen


def test_of_random_weights_no_accuracy_is_quoted(tiny_engine: Engines) -> None:
    tiny = tiny_engine("glm4v", "int8")
    result = compare.run(tiny.path, tiny.checkpoint, plan=TINY, threads=1)
    assert list(result) == ["int8", "accuracy", "machine"]
    assert list(result["accuracy"]) == ["torch"]
    shown = render_markdown(result)
    assert "error of image features, relative to torch's" in shown
    assert "as random weights do, so nothing is said of accuracy" in shown
    assert "perplexity" not in shown


def test_a_model_that_predicts_is_judged_by_its_predictions() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 50, 200)
    expected = rng.standard_normal((200, 50)).astype(np.float32)
    expected[np.arange(200), targets] += 5
    actual = expected.copy()
    actual[:20] = -actual[:20]
    found = predictions(expected, actual, targets)["teacher_forcing"]
    assert found["perplexity"]["torch"] < 2 < found["perplexity"]["engine"]
    assert found["top1_agreement"] == pytest.approx(0.9)
    assert found["kl_divergence"] > 0


def test_samples_without_images_need_no_vision_encoder(tiny_engine: Engines) -> None:
    found = compared(tiny_engine("glm4v"), [EvaluationSample("Where?", "There, below.")])
    assert set(found["relative_error"]) == {"logits"}


def test_another_checkpoint_is_refused_before_measuring(
    tiny_engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*ignored: object) -> None:
        raise AssertionError("measured before the checkpoint was looked at")

    monkeypatch.setattr(compare, "_footprints", measured)
    with pytest.raises(InputError, match="was compiled from another checkpoint"):
        compare.run(tiny_engine("glm4v").path, tiny_engine("qwen2_vl").checkpoint, plan=TINY)


def test_engines_that_do_not_fit_together_are_refused(
    tiny_engine: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.machine, "available_memory", lambda: 1_000_000)
    paths = tiny_engine("glm4v", "int8").path, tiny_engine("glm4v").path
    with pytest.raises(InputError, match=r"more than the 0\.0 GB .* give the checkpoint as the"):
        compare.run(*paths, plan=TINY)


def test_a_picture_of_one_engine_is_refused_before_measuring(
    tiny_engine: Engines, tmp_path: Path
) -> None:
    tiny = tiny_engine("glm4v")
    arguments = ["bench", tiny.path, "--baseline", tiny.checkpoint, "--plot", tmp_path / "x.png"]
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 2
    assert "give a second engine" in result.output
    assert not list(tmp_path.iterdir())
