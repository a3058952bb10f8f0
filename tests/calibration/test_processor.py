"""Both processors scale large screenshots down to the reference's limit of visual tokens."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from calibration.evaluate import REFERENCE  # noqa: E402
from calibration.model import IMAGE_TOKENS  # noqa: E402
from calibration.phone import Phone  # noqa: E402
from calibration.processor import ImageTextProcessor  # noqa: E402
from glmcompile.families import family_for  # noqa: E402
from glmcompile.runtime.image_processor import ImageProcessor  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (REFERENCE / "model.safetensors").exists(), reason="the checkpoint is not in this checkout"
)


@pytest.fixture(scope="module")
def processors() -> tuple[ImageProcessor, ImageTextProcessor]:
    """The runtime's and transformers'."""
    settings = json.loads((REFERENCE / "preprocessor_config.json").read_text())
    config = transformers.AutoConfig.from_pretrained(REFERENCE).to_dict()
    family = family_for(config)
    vision = family.model_config(config, settings, {}).vision
    assert vision is not None
    return ImageProcessor(family, vision), ImageTextProcessor.from_pretrained(REFERENCE)


@pytest.mark.parametrize("size", [(1080, 2400), (1440, 3120), (2400, 1080), (672, 1176)])
def test_a_large_screenshot_costs_no_more_tokens_than_the_limit(processors, size):
    ours, theirs = processors
    picture = Phone("evaluation", 0, 2.0).screen.image.resize(size)
    expected = theirs.image_processor(picture, return_tensors="np")
    result = ours(picture)
    assert result.grid_thw == tuple(expected["image_grid_thw"][0])
    assert (result.pixel_values == expected["pixel_values"]).all()
    frames, rows, columns = result.grid_thw
    assert 0.9 * IMAGE_TOKENS < frames * rows * columns // 4 <= IMAGE_TOKENS


@pytest.mark.parametrize(("scale", "size"), [(1.0, (168, 336)), (2.0, (224, 392))])
def test_screens_within_the_limit_are_left_alone(processors, scale, size):
    ours, _ = processors
    screen = Phone("evaluation", 1, scale, size).screen
    width, height = screen.image.size
    assert (width, height) == (size[0] * scale, size[1] * scale)
    assert ours(screen.image).pixels.shape == (height, width, 3)
