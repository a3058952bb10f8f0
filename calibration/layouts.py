"""The layouts: arrangements of a screen, each of which belongs to exactly one split.

A layout fixes everything about where things stand (size, rows, columns, dock, margins, alignment)
and nothing about what they say. Splits share the words but no layout, so that an accuracy on the
evaluation split is one on arrangements that training never showed.
"""

from dataclasses import astuple, dataclass
from itertools import product

SPLITS = ("train", "calibration", "evaluation")
GRID = 14  # vertical positions are multiples of a patch of the vision encoder
STATUS_BAR, TITLE_BAR = GRID, 3 * GRID


@dataclass(frozen=True, order=True)
class Layout:
    """One arrangement; pixels throughout.

    family: "home" (grid of apps), "list" (rows), "form" (fields and buttons) or "dialog".
    rows, columns: of the grid, the list (1 column), or the fields and the buttons a line.
    extra: a dock below a grid, an icon before each row, stacked buttons of a dialog.
    """

    family: str
    width: int
    height: int
    rows: int
    columns: int
    extra: bool
    centred: bool
    margin: int

    @property
    def id(self) -> str:
        return "-".join(str(int(v) if isinstance(v, bool) else v) for v in astuple(self))


def _enumerate() -> list[Layout]:
    small, medium, large, wide = (168, 336), (196, 364), (224, 392), (336, 168)
    both = (False, True)
    layouts = []

    def add(family, sizes, rows, columns, extras, margins):
        for (width, height), *rest in product(sizes, rows, columns, extras, both, margins):
            layouts.append(Layout(family, width, height, *rest))

    add("home", [small], (3, 4), (2, 3), both, (0, 7))
    add("home", [medium], (4,), (3,), both, (0, 7))
    add("home", [medium], (3, 5), (3,), (False,), (0, 7))
    add("home", [large], (4, 5), (3, 4), both, (7,))
    add("home", [wide], (2,), (4, 5), (False,), (0, 14))
    add("list", [small], (4, 5, 6), (1,), both, (0, 7))
    add("list", [medium, large], (5, 6), (1,), both, (7,))
    add("list", [wide], (2,), (1,), both, (7, 14, 28))
    add("form", [small, medium], (2, 3), (1, 2), (False,), (7, 14))
    add("form", [large], (3, 4), (1, 2), (False,), (14,))
    add("form", [wide], (1,), (2, 3), (False,), (14,))
    add("dialog", [small, medium, large], (1, 2), (2,), both, (14,))
    add("dialog", [wide], (1,), (2, 3), (False,), (28,))
    return sorted(set(layouts))


def _partition(layouts: list[Layout]) -> dict[str, tuple[Layout, ...]]:
    """Every sixth layout of a family to evaluation, the one after it to calibration.

    The stride of 6 with an odd start mixes the two alignments and both margins into each split.
    """
    parts: dict[str, list[Layout]] = {split: [] for split in SPLITS}
    for family in sorted({layout.family for layout in layouts}):
        members = [layout for layout in layouts if layout.family == family]
        for i, layout in enumerate(members):
            split = {2: "evaluation", 5: "calibration"}.get((i + i // 6) % 6, "train")
            parts[split].append(layout)
    return {split: tuple(members) for split, members in parts.items()}


LAYOUTS: dict[str, tuple[Layout, ...]] = _partition(_enumerate())
