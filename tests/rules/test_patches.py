"""Images are resized as transformers' processors for grids of patches resize them."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, replace

import pytest

from glmcompile.errors import InputError
from glmcompile.rules.patches import PatchSettings
from tests.contracts import PATCHES

PLAIN = PatchSettings.read(PATCHES)
GLM4V = replace(PLAIN, bounds_count_frames=True, grows_small=True)
SETTINGS = {"glm4v": GLM4V, "qwen2_vl": PLAIN}


@pytest.mark.parametrize(
    "size", [(1, 1), (20, 500), (480, 640), (2400, 1080), (31, 33), (4000, 6000), (27, 29)]
)
@pytest.mark.parametrize("bounds", [(56 * 56, 28 * 28 * 64), (112 * 112, 28 * 28 * 15000)])
@pytest.mark.parametrize("name", SETTINGS)
def test_resize_equals_transformers(
    name: str, size: tuple[int, int], bounds: tuple[int, int]
) -> None:
    module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    settings = replace(SETTINGS[name], min_pixels=bounds[0], max_pixels=bounds[1])
    frames = {"num_frames": 2} if name == "glm4v" else {}
    expected = module.smart_resize(
        height=size[0],
        width=size[1],
        factor=28,
        min_pixels=bounds[0],
        max_pixels=bounds[1],
        **frames,
    )
    assert settings.resize(*size) == expected


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_resize_refuses_a_sliver(settings: PatchSettings) -> None:
    with pytest.raises(InputError, match="60x12300"):
        settings.resize(12300, 60)


def test_counts_follow_from_the_settings() -> None:
    assert PLAIN.channels == 3
    assert PLAIN.patch_values == 3 * 2 * 14 * 14
    assert PLAIN.image_tokens((1, 8, 12)) == 24


def test_settings_survive_json() -> None:
    """Lists, as JSON gives them, become tuples again."""
    assert PLAIN.mean == tuple(PATCHES["mean"])
    assert PatchSettings.read(json.loads(json.dumps(asdict(PLAIN)))) == PLAIN
