"""Recipes: what the bundled one says, overrides by layer name, errors that name the entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmcompile.errors import CalibrationError
from glmcompile.quantize.schemes import W8A8, Float32, load_recipe


def test_the_default_recipe_is_w8a8_with_an_int8_cache() -> None:
    recipe = load_recipe()
    assert recipe.scheme_for("model.layers.0.mlp.down_proj") == W8A8(0.5)
    assert recipe.kv_dtype == "int8"


def test_the_first_override_that_matches_wins(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[linear]\nscheme = "w8a8"\nsmoothing = 0.7\n'
        '[[override]]\nlayers = "*.0.*"\nscheme = "float32"\n'
        '[[override]]\nlayers = "*"\nscheme = "w8a8"\nsmoothing = 0.0\n'
    )
    recipe = load_recipe(file)
    assert recipe.linear == W8A8(0.7)
    assert recipe.scheme_for("layers.0.q") == Float32()
    assert recipe.scheme_for("layers.1.q") == W8A8(0.0)
    assert recipe.to_json()["overrides"][0] == {"layers": "*.0.*", "scheme": "float32"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = ", "not a TOML file"),
        ('[linear]\nscheme = "w2a2"', "scheme = 'w2a2'; expected one of float32, w8a8"),
        ('[linear]\nscheme = "w8a8"\nsmoothing = 2', "smoothing = 2; expected 0 to 1"),
        ('[linear]\nscheme = "w8a8"\nalpha = 1', "does not take"),
        ('[kv_cache]\ndtype = "int3"', "dtype = 'int3'"),
        ("[calibration]\nsamples = 0", "samples = 0"),
        ("kv_cache = 5", r"kv_cache = 5; expected a table \[kv_cache\]"),
        ("override = 5", r"override = 5; expected a table \[\[override\]\]"),
        ("override = [5]", "needs layers"),
        ("[magic]", r"unknown table \[magic\]"),
        ('[[override]]\nscheme = "float32"', "needs layers"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(CalibrationError, match=message):
        load_recipe(file)


def test_an_unknown_recipe_lists_the_bundled_ones(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no such bundled recipe \(default"):
        load_recipe("nosuch")
    with pytest.raises(CalibrationError, match="cannot read"):
        load_recipe(tmp_path / "nosuch.toml")
