"""Calibration samples: bundled ones, folders, and errors that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from glmcompile.calibrate.samples import bundled_samples, digest, folder_samples
from glmcompile.errors import CalibrationError


def write(folder: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text)
    return folder


def test_bundled_samples_have_images_for_image_models_alone() -> None:
    assert all(sample.images and sample.prompt for sample in bundled_samples(True, 3))
    texts = list(bundled_samples(False, 4))
    assert not any(sample.images for sample in texts)
    assert {bool(sample.prompt) for sample in texts} == {True, False}


def test_a_folder_is_read_up_to_the_count(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    write(tmp_path, {"prompt": "a", "image": "a.png", "answer": "x"}, {"prompt": "b"}, {"bad": 1})
    first, second = folder_samples(tmp_path, 2)
    assert first.images == (tmp_path / "a.png",)
    assert (first.answer, second.prompt, second.images) == ("x", "b", ())


def test_the_digest_follows_prompts_and_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    samples = list(folder_samples(write(tmp_path, {"prompt": "a", "image": "a.png"}), 1))
    before = digest(samples)
    assert before == digest(samples)
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    assert digest(samples) != before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "holds no sample"),
        (("not json",), "samples.jsonl:1"),
        (({"prompt": "a"}, {"answer": "b"}), "samples.jsonl:2"),
        (({"prompt": 5},), "are to be strings"),
        (({"prompt": "a", "image": "gone.png"},), "gone.png does not exist"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: tuple[object, ...], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        list(folder_samples(write(tmp_path, *lines), 10))


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_bytes(b"\xff\xfe\x80\n")
    with pytest.raises(CalibrationError, match=r"samples\.jsonl:1"):
        list(folder_samples(tmp_path, 1))


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"samples\.jsonl"):
        list(folder_samples(tmp_path, 1))
