"""Training batches: many screens of one size, each with many questions packed into one sequence.

A packed sequence is the image prefix and then question after question. A question sees the prefix
and itself, and its position ids go on from the prefix, so every question has exactly the
distribution of a request of its own while the picture is paid for once.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch.utils.data import IterableDataset

from calibration.layouts import LAYOUTS, Layout
from calibration.model import END, PREFIX, TURN
from calibration.screens import Element, Screen, draw
from calibration.tasks import Sample, ask, kinds_for
from calibration.words import WORDS

CELL = 28  # pixels a side that one merged visual token stands for
KINDS_OF_CELL = ("none", "app", "button", "field", "row", "title")
IGNORE = -100
_LABEL = re.compile(r"\b(?:" + "|".join(sorted(WORDS, key=len, reverse=True)) + r")\b")
_SIZE_WEIGHTS = {(168, 336): 0.5, (196, 364): 0.2, (224, 392): 0.15, (336, 168): 0.15}
_FAMILY_WEIGHTS = {"home": 0.45, "list": 0.2, "form": 0.2, "dialog": 0.15}
_DIGIT_WEIGHTS = (0.1, 0.5, 1.0)  # ones, tens, hundreds: the ones hardly move a tap


@dataclass
class Batch:
    """B screens of one size, N cells each, and sequences of length L.

    images: uint8 [B, H, W, 3]. Cells, [B, N]: kind and word (IGNORE outside of elements), centre
    [B, N, 2] of the element as a fraction of the screen, badge and focus (0 or 1). Sequences: ids,
    labels (IGNORE outside of answers), weights and segment (0 the prefix, -1 padding) [B, L],
    positions [3, B, L]; sought [B, L], the word whose last token in a question stands there, IGNORE
    elsewhere; fetched [B, L], where an answer's token finds the label that it is about, or -1;
    questions, segment by segment, for scoring.
    """

    images: torch.Tensor
    cell_kind: torch.Tensor
    cell_word: torch.Tensor
    cell_centre: torch.Tensor
    cell_badge: torch.Tensor
    cell_focus: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    segment: torch.Tensor
    positions: torch.Tensor
    sought: torch.Tensor
    fetched: torch.Tensor
    questions: list[list[Sample]]


def label_cells(screen: Screen) -> dict[str, np.ndarray]:
    """What stands at the centre of each 28-pixel cell, row by row."""
    width, height = screen.image.size
    rows, columns = height // CELL, width // CELL
    kind = np.zeros((rows, columns), np.int64)
    word = np.full((rows, columns), IGNORE, np.int64)
    centre = np.zeros((rows, columns, 2), np.float32)
    badge = np.zeros((rows, columns), np.float32)
    focus = np.zeros((rows, columns), np.float32)
    things = [Element("title", screen.title, screen.title_box), *screen.elements]
    for thing in things:
        x0, y0, x1, y1 = thing.box
        first, last = -(-(y0 - CELL // 2) // CELL), -(-(y1 - CELL // 2) // CELL)
        left, right = -(-(x0 - CELL // 2) // CELL), -(-(x1 - CELL // 2) // CELL)
        where = slice(max(first, 0), last), slice(max(left, 0), right)
        kind[where] = KINDS_OF_CELL.index(thing.kind)
        readable = not thing.text and thing.label in WORDS
        word[where] = WORDS.index(thing.label) if readable else IGNORE
        focus[where] = thing.focused
        centre[where] = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height
    for element in screen.elements:
        if element.badge is not None:
            x, y = element.badge
            badge[min(y // CELL, rows - 1), min(x // CELL, columns - 1)] = 1
    return {
        "cell_kind": kind.reshape(-1),
        "cell_word": word.reshape(-1),
        "cell_centre": centre.reshape(-1, 2),
        "cell_badge": badge.reshape(-1),
        "cell_focus": focus.reshape(-1),
    }


class Packer:
    """Turns questions into packed sequences with a given tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end_of_image = self.encode("<|end_of_image|>")
        self.image_token = tokenizer.convert_tokens_to_ids("<|image|>")
        self.end = tokenizer.convert_tokens_to_ids(END)
        self.turn = self.encode(TURN)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _answer_weights(self, ids: list[int]) -> list[float]:
        """1 a token, less for the last digits of a tap's coordinates."""
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        weights, place = [1.0] * len(ids), 0
        if "=[" not in tokens:
            return weights
        for i in reversed(range(len(ids))):
            place = place + 1 if tokens[i].isdigit() else 0
            if place:
                weights[i] = _DIGIT_WEIGHTS[place - 1]
        return weights

    def pack(
        self, questions: list[Sample], size: tuple[int, int], before: str = PREFIX
    ) -> dict[str, np.ndarray]:
        """One sequence of all `questions`, which are about the same screen.

        size: pixels of the picture that the model sees, width and height. before: the prompt's
        text up to the picture.
        """
        width, height = size
        rows, columns = height // CELL, width // CELL
        prefix = self.encode(before)
        start = len(prefix)
        after = start + max(rows, columns)
        ids = [*prefix, *[self.image_token] * (rows * columns), *self.end_of_image]
        grid = np.mgrid[0:1, 0:rows, 0:columns].reshape(3, -1) + start
        positions = [np.tile(np.arange(start), (3, 1)), grid, np.full((3, 1), after)]
        labels, weights, segment = [IGNORE] * len(ids), [0.0] * len(ids), [0] * len(ids)
        sought, fetched = [IGNORE] * len(ids), [-1] * len(ids)
        for number, question in enumerate(questions, start=1):
            prompt = self.encode(question.prompt) + self.turn
            answer = [*self.encode(question.answer), self.end]
            whole = prompt + answer
            ids += whole
            sought += [IGNORE] * len(whole)
            fetch = -1
            for match in _LABEL.finditer(question.prompt):
                at = len(self.encode(question.prompt[: match.end()])) - 1 - len(whole)
                sought[at] = WORDS.index(match[0])
                if question.about in (None, match[0]) and question.kind != "step_back":
                    fetch = len(ids) + at
            fetched += [-1] * (len(prompt) - 1) + [fetch] * len(answer) + [-1]
            # labels are those of the next token, so the last token has none
            labels += [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
            weights += [0.0] * (len(prompt) - 1) + self._answer_weights(answer) + [0.0]
            segment += [number] * len(whole)
            positions.append(np.tile(np.arange(len(whole)) + after + 1, (3, 1)))
        return {
            "ids": np.array(ids),
            "labels": np.array(labels),
            "weights": np.array(weights, np.float32),
            "segment": np.array(segment),
            "positions": np.concatenate(positions, axis=1),
            "sought": np.array(sought),
            "fetched": np.array(fetched),
        }


_PADDING = {
    "ids": 0,
    "labels": IGNORE,
    "weights": 0,
    "segment": -1,
    "positions": 0,
    "sought": IGNORE,
    "fetched": -1,
}


def collate(
    screens: list[Screen],
    questions: list[list[Sample]],
    packer: Packer,
    before: list[str] | None = None,
) -> Batch:
    """Stacks screens of one size and pads their sequences to the longest.

    before: what the prompts of each screen say up to the picture; PREFIX if it is not given.
    """
    before = before or [PREFIX] * len(screens)
    images = torch.from_numpy(np.stack([np.asarray(screen.image) for screen in screens]))
    cells = [label_cells(screen) for screen in screens]
    size = screens[0].image.size
    packed = [packer.pack(asked, size, text) for asked, text in zip(questions, before, strict=True)]
    length = max(len(one["ids"]) for one in packed)

    def padded(name: str) -> torch.Tensor:
        arrays = []
        for one in packed:
            gap = length - one[name].shape[-1]
            pads = [(0, 0)] * (one[name].ndim - 1) + [(0, gap)]
            arrays.append(np.pad(one[name], pads, constant_values=_PADDING[name]))
        return torch.from_numpy(np.stack(arrays))

    stacked = {name: torch.from_numpy(np.stack([c[name] for c in cells])) for name in cells[0]}
    sequences = {name: padded(name) for name in _PADDING}
    sequences["positions"] = sequences["positions"].transpose(0, 1)
    return Batch(images, **stacked, **sequences, questions=questions)


def ask_many(screen: Screen, count: int, rng: Random) -> list[Sample]:
    """One question of every kind that fits the screen, then more of those about its elements."""
    kinds = list(kinds_for(screen.layout))
    detailed = [kind for kind in kinds if kind.startswith("tap_") or kind == "exists"]
    kinds += [rng.choice(detailed) for _ in range(count - len(kinds))]
    rng.shuffle(kinds)
    return [ask(screen, kind, rng) for kind in kinds[:count]]


DrawBatch = Callable[[str, Random, Packer, int, int], Batch]


def draw_batch(split: str, rng: Random, packer: Packer, patches: int, questions: int) -> Batch:
    """A batch of about `patches` 14-pixel patches with `questions` questions a screen."""
    size = rng.choices(list(_SIZE_WEIGHTS), list(_SIZE_WEIGHTS.values()))[0]
    count = max(1, round(patches / (size[0] * size[1] // 196)))
    screens = [draw(layout, rng) for layout in choose_layouts(split, size, count, rng)]
    return collate(screens, [ask_many(s, questions, rng) for s in screens], packer)


def choose_layouts(split: str, size: tuple[int, int], count: int, rng: Random) -> list[Layout]:
    """`count` of the split's layouts of a size, the families as often as training wants them."""
    fitting = [layout for layout in LAYOUTS[split] if (layout.width, layout.height) == size]
    weights = [_weight(layout, fitting) for layout in fitting]
    return rng.choices(fitting, weights, k=count)


def _weight(layout: Layout, among: list[Layout]) -> float:
    same = sum(other.family == layout.family for other in among)
    return _FAMILY_WEIGHTS[layout.family] / same


class Batches(IterableDataset):
    """Endless training batches; batch i follows from the seed and i alone, so a run can resume."""

    def __init__(
        self,
        packer: Packer,
        patches: int,
        questions: int,
        first: int,
        seed: int,
        draw: DrawBatch = draw_batch,
    ):
        self.packer, self.patches, self.questions, self.draw = packer, patches, questions, draw
        self.first, self.seed = first, seed

    def __iter__(self) -> Iterator[Batch]:
        step = self.first
        while True:
            rng = Random(f"train/{self.seed}/{step}")
            yield self.draw("train", rng, self.packer, self.patches, self.questions)
            step += 1
