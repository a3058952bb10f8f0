"""The pipeline: what it takes and gives, the devices it refuses, and that importing stays light."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glmcompile import AutoGLMPipeline
from glmcompile.errors import ArtifactError, ClosedError, InputError
from tests.engines import TinyEngine

SMALL: dict[str, Any] = {"threads": 2, "kv_cache_bytes": 8 << 20}


@pytest.fixture(scope="module")
def path(tiny_engine: Callable[[str], TinyEngine]) -> Path:
    return tiny_engine("glm4v").path


@pytest.fixture(scope="module")
def pipeline(path: Path) -> Iterator[AutoGLMPipeline]:
    with AutoGLMPipeline.from_pretrained(path, device_map="auto", **SMALL) as opened:
        yield opened


@pytest.fixture
def screen() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (112, 84, 3), np.uint8)
    return Image.fromarray(pixels)


def test_the_response_is_the_engines_answer(pipeline: AutoGLMPipeline, screen: Image.Image) -> None:
    answer = pipeline(image=screen, prompt="Open Settings", max_tokens=8)
    expected = pipeline.engine.generate(prompt="Open Settings", images=[screen], max_tokens=8)
    assert answer == {"response": expected.text}
    assert expected.usage.image_tokens > 0
    assert answer != pipeline(prompt="Open Settings", max_tokens=8)


def test_an_image_may_be_a_path_bytes_an_array_or_a_list(
    pipeline: AutoGLMPipeline, screen: Image.Image, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    screen.save(buffer, "png")
    file = tmp_path / "screen.png"
    file.write_bytes(buffer.getvalue())
    same = [screen, file, str(file), buffer.getvalue(), np.asarray(screen), [screen], (file,)]
    answers = [pipeline(image=image, prompt="Tap", max_tokens=6)["response"] for image in same]
    assert answers == answers[:1] * len(same)
    two = pipeline(image=[screen, screen.rotate(180)], prompt="Tap", max_tokens=6)["response"]
    assert two != answers[0]


def test_generation_options_reach_the_sampler(pipeline: AutoGLMPipeline) -> None:
    sampled = {pipeline(prompt="Hi", temperature=2.0, seed=s)["response"] for s in (1, 1, 2)}
    assert len(sampled) == 2
    with pytest.raises(InputError, match="no sampling option 'max_new_token'"):
        pipeline(prompt="Hi", max_new_token=3)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, None])
def test_devices_that_mean_the_cpu_are_taken(path: Path, device_map: Any) -> None:
    with AutoGLMPipeline.from_pretrained(path, device_map=device_map, **SMALL) as opened:
        assert "response" in opened(prompt="Hi", max_tokens=1)


@pytest.mark.parametrize(
    "device_map",
    ["cuda", "cuda:0", "balanced", {"": 0}, {"": "cuda"}, {"visual": "cpu", "": "cpu"}, {}, 0],
)
def test_devices_that_it_cannot_honour_are_refused(path: Path, device_map: Any) -> None:
    with pytest.raises(InputError, match="runs on the CPU"):
        AutoGLMPipeline.from_pretrained(path, device_map=device_map)


def test_an_engine_option_that_does_not_exist_is_named(path: Path) -> None:
    with pytest.raises(InputError, match="no engine option 'torch_dtype'; there are threads"):
        AutoGLMPipeline.from_pretrained(path, torch_dtype="auto")


def test_a_checkpoint_is_told_to_be_compiled_first(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    with pytest.raises(ArtifactError, match="it is a checkpoint; compile it first"):
        AutoGLMPipeline.from_pretrained(tiny_checkpoint("glm4v"))


@pytest.mark.parametrize("prompt", [None, 3, ["Hi"]])
def test_a_prompt_that_is_no_string_is_refused(pipeline: AutoGLMPipeline, prompt: Any) -> None:
    with pytest.raises(InputError, match="expected a string"):
        pipeline(prompt=prompt)


def test_a_closed_pipeline_says_so(path: Path) -> None:
    with AutoGLMPipeline.from_pretrained(path, **SMALL) as opened:
        pass
    with pytest.raises(ClosedError, match="closed"):
        opened(prompt="Hi")


def test_importing_the_package_imports_no_engine() -> None:
    code = (
        "import sys, glmcompile;"
        "assert 'onnxruntime' not in sys.modules and 'numpy' not in sys.modules;"
        "assert not hasattr(glmcompile, 'Pipeline')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
