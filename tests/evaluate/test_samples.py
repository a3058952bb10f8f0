"""Evaluation samples: the bundled split, and folders of users."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from glmcompile.errors import CalibrationError, InputError
from glmcompile.evaluate.samples import bundled_samples, user_samples


def write(folder: Path, *lines: dict[str, str]) -> Path:
    Image.new("RGB", (56, 56)).save(folder / "screen.png")
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_bundled_screens_judge_answers() -> None:
    for sample in bundled_samples(True, 9):
        assert sample.correct is not None
        assert sample.correct(sample.answer)
        assert not sample.correct("something else")


def test_bundled_texts_have_nothing_to_answer() -> None:
    samples = list(bundled_samples(False, 3))
    assert [sample.correct for sample in samples] == [None] * 3
    assert all(sample.answer and not sample.prompt for sample in samples)


def test_a_folders_answers_match_but_for_white_space_at_the_ends(tmp_path: Path) -> None:
    line = {"prompt": "Title?", "answer": "Set tings", "image": "screen.png"}
    (sample,) = user_samples(write(tmp_path, line), 10)
    assert sample.correct is not None
    assert sample.correct(" Set tings\n")
    assert not sample.correct("Settings")
    assert sample.images == (tmp_path / "screen.png",)


def test_a_sample_without_an_answer_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {"prompt": "a", "answer": "b"}, {"prompt": "c"})
    with pytest.raises(InputError, match="sample 2 has no answer"):
        list(user_samples(folder, 10))


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"samples\.jsonl"):
        list(user_samples(tmp_path, 10))
