"""How long things may take: what of what grows, and the stages that a compile shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from glmcompile.bench.rates import Rates
from glmcompile.compiler import compile_checkpoint, timing
from glmcompile.compiler.geometry import geometry
from glmcompile.compiler.needs import PROMPT_TOKENS, Load, prompt_of, space
from glmcompile.progress import Silent


class Watched(Silent):
    """Keeps what a compile tells of itself."""

    def __init__(self) -> None:
        self.expected: dict[str, float] = {}
        self.shown: list[str] = []

    def expect(self, seconds: dict[str, float]) -> None:
        self.expected = dict(seconds)

    def stage(self, name: str, total: int | None = None, done: int = 0) -> Callable[[int], None]:
        self.shown.append(name)
        return lambda done: None


def test_a_compile_shows_the_stages_that_it_expects(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    watched = Watched()
    compile_checkpoint(
        tiny_checkpoint("glm4v"), tmp_path / "engine", precision="fp32", progress=watched
    )
    assert list(watched.expected) == watched.shown
    assert all(seconds > 0 for seconds in watched.expected.values())


def test_more_tokens_and_a_larger_screenshot_take_longer_and_more(checkpoint_of: Callable) -> None:
    checkpoint = checkpoint_of("glm4v")
    shapes, model = geometry(checkpoint), checkpoint.model
    found = []
    for image in ((56, 56), (140, 140)):
        prompt = prompt_of(checkpoint, image)
        on = timing.measure(checkpoint, shapes, prompt, image, threads=2)
        assert on.preprocess > 0
        # Rates of one moment for both.
        on = timing.Machine({"int8": Rates(300, 100, 200, 90, 0.01)}, 1, 1e8, 1e9, 0.0)
        latency = timing.latency(shapes, model, "int8", prompt, on)
        found.append((prompt, latency, space(shapes, model, "int8", prompt, Load())))
    (small, fast, little), (large, slow, much) = found
    assert 0 < small.patches < large.patches
    for prompt in (small, large):
        assert prompt.tokens == PROMPT_TOKENS + prompt.patches // 4
    assert 0 < fast.vision < slow.vision < slow.ttft
    assert fast.ttft < slow.ttft
    assert little.activations < much.activations


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_calibration_takes_time_in_int8_alone(checkpoint_of: Callable, precision: str) -> None:
    checkpoint = checkpoint_of("llama")
    shapes = geometry(checkpoint)
    alone, loaded = (
        timing.stages(checkpoint, shapes, precision, load)["Compiling decoder"]
        for load in (Load(), Load(samples=8, tokens=4000, longest=900))
    )
    assert (loaded > alone) == (precision == "int8")
