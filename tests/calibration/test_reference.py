"""The committed checkpoint: it loads through transformers, is small, and answers as it should."""

import json

import pytest

import calibration

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from calibration.evaluate import REFERENCE, Reference  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (REFERENCE / "model.safetensors").exists(), reason="the checkpoint is not in this checkout"
)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def test_it_is_a_small_glm4v(reference):
    config = json.loads((REFERENCE / "config.json").read_text())
    assert config["model_type"] == "glm4v"
    assert config["architectures"] == ["Glm4vForConditionalGeneration"]
    assert sum(file.stat().st_size for file in REFERENCE.iterdir()) < 40 << 20
    assert 5e6 < sum(p.numel() for p in reference.model.parameters()) < 20e6


def test_gemm_sizes_are_multiples_of_64(reference):
    text, vision = reference.model.config.text_config, reference.model.config.vision_config
    sizes = (text.hidden_size, text.intermediate_size, vision.hidden_size, vision.out_hidden_size)
    assert all(size % 64 == 0 for size in sizes)
    assert text.hidden_size // text.num_attention_heads == 64
    assert vision.hidden_size // vision.num_heads == 64


def test_screens_are_not_resized(reference):
    for sample in calibration.samples("evaluation", 9):
        inputs = reference.processor.image_processor(sample.image, return_tensors="pt")
        grid = inputs["image_grid_thw"][0].tolist()
        assert grid == [1, sample.image.height // 14, sample.image.width // 14]


def test_most_answers_are_correct(reference):
    chosen = list(calibration.samples("evaluation", 18))
    right = sum(calibration.is_correct(s, reference.answer(s)) for s in chosen)
    assert right >= 13
