"""A simulated phone: screens of the generator behind taps, typing, Back and Home.

A phone is a split, a seed and a path of what was opened. Its pages are drawn anew from the seed and
the path, so nothing but the agent's parsed actions ever changes it, and the same actions give the
same bytes. The actions are Open-AutoGLM's, coordinates in thousandths of the screen.
"""

import re
from dataclasses import dataclass
from random import Random

from calibration.layouts import LAYOUTS, Layout
from calibration.screens import DARK, LIGHT, Element, Look, Screen, draw

HOME = "Home"  # the title of the home screen
DEEPEST = 4  # pages lie at most so many taps below the home screen
_APP_PAGES = ("list", "form", "dialog")
_SIZES = ((168, 336), (196, 364), (224, 392))  # upright ones


@dataclass(frozen=True)
class Action:
    """One parsed action. name: "Tap", "Type", "Back", "Home", "Launch" or "finish".

    point: x and y of a tap in thousandths. text: what is typed, launched or reported.
    """

    name: str
    point: tuple[int, int] | None = None
    text: str = ""


_TAP = re.compile(r'do\(action="Tap", element=\[(\d{1,3}),\s?(\d{1,3})\]\)')
_TYPE = re.compile(r'do\(action="Type", text="([^"\n]*)"\)')
_LAUNCH = re.compile(r'do\(action="Launch", app="([^"\n]*)"\)')
_MOVE = re.compile(r'do\(action="(Back|Home)"\)')
_FINISH = re.compile(r'finish\(message="([^"\n]*)"\)')


def parse(answer: str) -> Action | None:
    """The action that the whole of `answer` spells, surrounding spaces aside, or None."""
    answer = answer.strip()
    if match := _TAP.fullmatch(answer):
        return Action("Tap", point=(int(match[1]), int(match[2])))
    if match := _MOVE.fullmatch(answer):
        return Action(match[1])
    for name, pattern in (("Type", _TYPE), ("Launch", _LAUNCH), ("finish", _FINISH)):
        if match := pattern.fullmatch(answer):
            return Action(name, text=match[1])
    return None


class Phone:
    """A phone of `split` and `seed`, at its home screen.

    path: the labels tapped from the home screen to the open page. focus: the label of the field
    with the cursor. typed: the text of fields, by page and label. finished: the agent said so.
    """

    def __init__(
        self,
        split: str,
        seed: int | str,
        scale: int = 1,
        size: tuple[int, int] | None = None,
    ):
        """scale: how much larger than their layouts screens are (`screens.Look`).
        size: of the layouts; None leaves it to the seed.

        Raises KeyError for a split that is none of layouts.SPLITS.
        """
        self._seed, self.scale = f"phone/{split}/{seed}", scale
        rng = Random(self._seed)
        self._layouts = _of_size(split, size or rng.choice(sizes_at(scale)))
        self._theme = rng.choice(LIGHT if rng.random() < 0.6 else DARK)
        self.path: tuple[str, ...] = ()
        self.focus: str | None = None
        self.typed: dict[tuple[tuple[str, ...], str], str] = {}
        self.finished = False
        self._drawn: dict[tuple, Screen] = {}

    def family(self, path: tuple[str, ...]) -> str:
        """What kind of page lies at `path`: "home", "list", "form" or "dialog"."""
        if not path:
            return "home"
        if len(path) > 1:
            return "dialog"
        kinds = [kind for kind in _APP_PAGES if kind in self._layouts]
        return Random(f"{self._seed}/{path}/family").choice(kinds)

    def page(self, path: tuple[str, ...]) -> Screen:
        """The page at `path` as it is now, which need not be the open one."""
        typed = {label: text for (page, label), text in self.typed.items() if page == path}
        focus = self.focus if path == self.path else None
        state = (path, self.scale, focus, *typed.items())
        if state not in self._drawn:
            title = path[-1] if path else HOME
            look = Look(self.scale, title, self._theme, focus, typed)
            rng = Random(f"{self._seed}/{path}")
            layout = rng.choice(self._layouts[self.family(path)])
            self._drawn[state] = draw(layout, rng, look)
        return self._drawn[state]

    @property
    def screen(self) -> Screen:
        """The open page."""
        return self.page(self.path)

    @property
    def title(self) -> str:
        return self.path[-1] if self.path else HOME

    def act(self, action: Action | None) -> None:
        """Does what the action says; None, a finished phone, or an action without aim do nothing.

        Typing replaces what the focused field holds.
        """
        if action is None or self.finished:
            return
        if action.name == "Tap":
            self._tap(action.point)
        elif action.name == "Type":
            if self.focus is not None:
                self.typed[self.path, self.focus] = action.text
        elif action.name == "Back":
            self._open(self.path[:-1])
        elif action.name == "Home":
            self._open(())
        elif action.name == "Launch":
            if any(app.label == action.text for app in self.page(()).elements):
                self._open((action.text,))
        else:
            self.finished = True

    def _open(self, path: tuple[str, ...]) -> None:
        self.path, self.focus = path, None

    def _tap(self, point: tuple[int, int] | None) -> None:
        assert point is not None, "a tap has a point"
        element = element_at(self.screen, point)
        if element is None:
            return
        if element.kind == "field":
            self.focus = element.label
        elif len(self.path) < DEEPEST:
            self._open((*self.path, element.label))


def element_at(screen: Screen, point: tuple[int, int]) -> Element | None:
    """The element that a tap at `point`, in thousandths, lands on."""
    x = (point[0] + 0.5) * screen.image.width / 1000
    y = (point[1] + 0.5) * screen.image.height / 1000
    for element in screen.elements:
        x0, y0, x1, y1 = element.box
        if x0 <= x < x1 and y0 <= y < y1:
            return element
    return None


def sizes_at(scale: int) -> tuple[tuple[int, int], ...]:
    """The upright sizes of layouts that phones have at this scale.

    Above 2 it is the smallest alone: 504x1008 pixels at a scale of 3, 648 visual tokens of GLM-4V.
    """
    return _SIZES if scale <= 2 else _SIZES[:1]


def _of_size(split: str, size: tuple[int, int]) -> dict[str, list[Layout]]:
    """The split's layouts of one size by family."""
    chosen: dict[str, list[Layout]] = {}
    for layout in LAYOUTS[split]:
        if (layout.width, layout.height) == size:
            chosen.setdefault(layout.family, []).append(layout)
    return chosen
