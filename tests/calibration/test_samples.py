"""The generator: deterministic, disjoint splits, answers that agree with their own scoring."""

import subprocess
import sys
from collections import Counter

import pytest

import calibration
from calibration.__main__ import write_folder
from calibration.layouts import LAYOUTS, SPLITS
from calibration.tasks import KINDS, Sample, kinds_for, layouts_for
from calibration.words import LABELS, WORDS


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Sample]]:
    return {split: list(calibration.samples(split, 90)) for split in SPLITS}


def test_same_seed_gives_the_same_bytes(drawn):
    again = list(calibration.samples("evaluation", 20))
    for first, second in zip(drawn["evaluation"], again, strict=False):
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.prompt, first.answer, first.box) == (second.prompt, second.answer, second.box)


def test_another_seed_or_split_gives_other_screens(drawn):
    first = drawn["evaluation"][0].image.tobytes()
    assert next(calibration.samples("evaluation", 1, seed=1)).image.tobytes() != first
    assert drawn["calibration"][0].image.tobytes() != first


def test_every_layout_is_in_exactly_one_split():
    ids = [layout.id for split in SPLITS for layout in LAYOUTS[split]]
    assert len(ids) == len(set(ids))
    for split in SPLITS:
        assert {layout.family for layout in LAYOUTS[split]} == {"home", "list", "form", "dialog"}
        assert len({(layout.width, layout.height) for layout in LAYOUTS[split]}) == 4
        for kind in KINDS:
            assert layouts_for(split, kind)


def test_screens_need_no_resizing():
    for split in SPLITS:
        for layout in LAYOUTS[split]:
            assert layout.width % 28 == 0
            assert layout.height % 28 == 0


@pytest.mark.parametrize("split", SPLITS)
def test_each_answer_is_correct_for_its_own_sample(drawn, split):
    for sample in drawn[split]:
        assert calibration.is_correct(sample, sample.answer)
        assert calibration.is_correct(sample, f" {sample.answer}\n")
        assert not calibration.is_correct(sample, "")


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_lie_on_the_screen_and_only_taps_have_one(drawn, split):
    for sample in drawn[split]:
        assert (sample.box is not None) == sample.kind.startswith("tap_")
        if sample.box is not None:
            x0, y0, x1, y1 = sample.box
            assert 0 <= x0 < x1 <= sample.image.width
            assert 0 <= y0 < y1 <= sample.image.height


def test_a_tap_beside_the_element_is_wrong(drawn):
    sample = next(s for s in drawn["evaluation"] if s.box is not None and s.box[1] > 40)
    assert not calibration.is_correct(sample, 'do(action="Tap", element=[500,5])')
    assert not calibration.is_correct(sample, sample.answer.replace("Tap", "Swipe"))


def test_kinds_are_balanced(drawn):
    counts = Counter(sample.kind for sample in drawn["evaluation"])
    assert set(counts) == set(KINDS)
    assert set(counts.values()) == {10}


def test_words_are_unambiguous():
    assert len(WORDS) == len(set(WORDS)) == sum(map(len, LABELS.values()))


def test_every_family_has_questions():
    for layout in LAYOUTS["train"]:
        assert {"type", "finish", "title", "exists"} < set(kinds_for(layout))


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, calibration, evaluation"):
        next(calibration.samples("test", 1))


def test_a_folder_has_one_record_for_each_picture(drawn, tmp_path):
    write_folder(drawn["train"][:3], tmp_path)
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 3
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_importing_the_package_loads_neither_torch_nor_numpy():
    code = "import calibration, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
