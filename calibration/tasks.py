"""The questions: what is asked about a screen, the answer expected, and when one is correct."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from PIL import Image

from calibration.layouts import LAYOUTS, SPLITS, Layout
from calibration.screens import Box, Element, Screen, draw
from calibration.words import LABELS, TYPED

KINDS = (
    "tap_app", "tap_button", "tap_field", "tap_row", "type", "finish", "title", "badges", "exists",
)  # fmt: skip
_FAMILIES = {
    "tap_app": ("home",),
    "tap_button": ("form", "dialog"),
    "tap_field": ("form",),
    "tap_row": ("list",),
    "badges": ("home", "list"),
}
_TAP_PROMPTS = {
    "app": ("Open {}.", "Tap the {} app."),
    "button": ("Press {}.", "Tap the {} button."),
    "field": ("Tap the {} field.",),
    "row": ("Select {}.",),
}
_TAP = re.compile(r'do\(action="Tap", element=\[(\d{1,3}),(\d{1,3})\]\)')


@dataclass(frozen=True)
class Sample:
    """One question about one screen. box: pixels x0, y0, x1, y1 of the element to tap, or None.

    about: of the labels that the prompt names, the one that the answer follows from, if any.
    """

    image: Image.Image
    prompt: str
    answer: str
    kind: str
    box: Box | None = None
    about: str | None = None


def tap(box: Box, size: tuple[int, int]) -> str:
    """The action that taps the centre of `box`, in thousandths of the screen's width and height."""
    x = (box[0] + box[2]) * 500 // size[0]
    y = (box[1] + box[3]) * 500 // size[1]
    return f'do(action="Tap", element=[{min(x, 999)},{min(y, 999)}])'


def is_correct(sample: Sample, answer: str) -> bool:
    """A tap has to land in the element's box; everything else has to match to the letter."""
    answer = answer.strip()
    if sample.box is None:
        return answer == sample.answer
    match = _TAP.fullmatch(answer)
    if match is None:
        return False
    width, height = sample.image.size
    x, y = (int(match[1]) + 0.5) * width / 1000, (int(match[2]) + 0.5) * height / 1000
    x0, y0, x1, y1 = sample.box
    return x0 <= x < x1 and y0 <= y < y1


def _ask_to_tap(screen: Screen, element: Element, rng: Random) -> Sample:
    prompt = rng.choice(_TAP_PROMPTS[element.kind]).format(element.label)
    answer = tap(element.box, screen.image.size)
    return Sample(screen.image, prompt, answer, f"tap_{element.kind}", element.box)


def ask(screen: Screen, kind: str, rng: Random) -> Sample:
    """A question of `kind` about `screen`, which must be of a family that has such questions."""
    image = screen.image
    if kind.startswith("tap_"):
        wanted = kind.removeprefix("tap_")
        elements = [element for element in screen.elements if element.kind == wanted]
        return _ask_to_tap(screen, rng.choice(elements), rng)
    if kind == "type":
        if rng.random() < 0.5:
            prompt, text = "Type the title.", screen.title
        else:
            text = rng.choice(TYPED)
            prompt = f"Type {text}."
        return Sample(image, prompt, f'do(action="Type", text="{text}")', kind)
    if kind == "finish":
        answer = f'finish(message="{screen.title} is open")'
        return Sample(image, f"Open {screen.title}.", answer, kind)
    if kind == "title":
        return Sample(image, "What is the title?", screen.title, kind)
    if kind == "badges":
        return Sample(image, "How many badges are there?", str(screen.badges), kind)
    if kind == "exists":
        role = rng.choice(screen.elements).kind
        shown = [element.label for element in screen.elements if element.kind == role]
        there = rng.random() < 0.5
        absent = [w for w in LABELS[role] if w not in shown and w != screen.title]
        label = rng.choice(shown if there else absent)
        article = "an" if label[0] in "AEIOU" else "a"
        prompt = f"Is there {article} {label} {role}?"
        return Sample(image, prompt, "yes" if there else "no", kind)
    raise ValueError(f"unknown kind of question {kind!r}; one of {', '.join(KINDS)} was expected")


def kinds_for(layout: Layout) -> tuple[str, ...]:
    """The kinds of questions that make sense on screens of `layout`."""
    return tuple(k for k in KINDS if k not in _FAMILIES or layout.family in _FAMILIES[k])


def layouts_for(split: str, kind: str) -> tuple[Layout, ...]:
    """The layouts of `split` whose screens can be asked a question of `kind`."""
    return tuple(layout for layout in LAYOUTS[split] if kind in kinds_for(layout))


def samples(split: str, count: int, seed: int = 0) -> Iterator[Sample]:
    """Yields `count` samples of a split, one question a screen, the kinds in turn.

    The same split and seed give the same samples, and a longer run begins with a shorter one.
    Raises ValueError for a split other than train, calibration and evaluation.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)} was expected")
    for index in range(count):
        rng = Random(f"{split}/{seed}/{index}")
        kind = KINDS[index % len(KINDS)]
        screen = draw(rng.choice(layouts_for(split, kind)), rng)
        yield ask(screen, kind, rng)
