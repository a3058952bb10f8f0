"""The drawing: a phone screen of a given layout, with Pillow alone, and where its elements are.

Pillow's built-in font (Aileron, CC0) is the only one used, so a seed gives the same bytes wherever
Pillow and its FreeType are the same. Lines of text stand on a grid of 14 pixels and begin at
multiples of 7, as in a design system with a baseline grid; patches of 14 pixels read that best.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

from calibration.layouts import GRID, STATUS_BAR, TITLE_BAR, Layout
from calibration.words import APPS, LABELS, ROWS, TITLES

Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]

HALF = GRID // 2
APP_HEIGHT = 4 * GRID
LINE = 3 * GRID  # of a field, a button, a row
BADGE = (226, 38, 46)
_PALETTE: tuple[Colour, ...] = (
    (24, 119, 242), (30, 160, 90), (245, 165, 20), (120, 70, 200), (20, 170, 190),
    (90, 100, 115), (225, 90, 160), (140, 95, 55), (150, 185, 40),
)  # fmt: skip


@dataclass(frozen=True)
class Theme:
    background: Colour
    panel: Colour
    text: Colour
    faint: Colour
    accent: Colour
    on_accent: Colour


LIGHT = tuple(
    Theme(background, (255, 255, 255), (20, 22, 26), (176, 182, 190), accent, (255, 255, 255))
    for background in ((244, 246, 249), (255, 255, 255), (236, 240, 232))
    for accent in ((24, 100, 220), (20, 125, 85))
)
DARK = tuple(
    Theme(background, (44, 48, 56), (240, 242, 245), (92, 98, 108), accent, (10, 14, 20))
    for background in ((16, 18, 22), (26, 28, 40))
    for accent in ((120, 180, 255), (130, 215, 165))
)


@dataclass(frozen=True)
class Element:
    """Something to touch. kind: "app", "button", "field" or "row"; box: pixels, half open."""

    kind: str
    label: str
    box: Box
    badge: tuple[int, int] | None = None  # the centre of its notification badge, if it has one
    focused: bool = False  # a field that takes what is typed
    text: str = ""  # what was typed into a field; it stands where the label did


@dataclass(frozen=True)
class Look:
    """What is decided about a screen beforehand; the rest is chance.

    scale: how many times as large as its layout the screen is, and all that can be touched; text
        and icons keep their size, as on a phone with a larger display.
    title, theme: None leaves them to chance. focus: the label of the field with the cursor.
    typed: the text in a field, by the field's label.
    """

    scale: int = 1
    title: str | None = None
    theme: Theme | None = None
    focus: str | None = None
    typed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Screen:
    """A drawn screen: its picture, what its title says and where, and its elements."""

    layout: Layout
    image: Image.Image
    title: str
    title_box: Box
    elements: tuple[Element, ...]

    @property
    def badges(self) -> int:
        return sum(element.badge is not None for element in self.elements)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


class _Canvas:
    """A picture in the making: what has been drawn on it and the elements found so far.

    Boxes are given in the layout's pixels; what is inside of them is placed in the picture's.
    """

    def __init__(self, layout: Layout, rng: Random, look: Look):
        self.layout, self.rng, self.look = layout, rng, look
        theme = rng.choice(LIGHT if rng.random() < 0.6 else DARK)
        self.theme = look.theme or theme
        size = layout.width * look.scale, layout.height * look.scale
        self.image = Image.new("RGB", size, self.theme.background)
        self.draw = ImageDraw.Draw(self.image)
        self.elements: list[Element] = []
        title = rng.choice(TITLES)
        self.title = look.title or title
        self.badges_left = rng.choice((0, 1, 1, 2, 2, 3, 3, 4))

    def scaled(self, box: Box) -> Box:
        x0, y0, x1, y1 = (value * self.look.scale for value in box)
        return x0, y0, x1, y1

    def text(
        self, x: float, y: float, text: str, size: int, fill: Colour, anchor: str = "m"
    ) -> float:
        """Writes around x ("m") or from x on ("l"), on the line of the grid that y lies in.

        Returns the x at which the text ends.
        """
        font = _font(size)
        length = font.getlength(text)
        left = round((x - length / 2 if anchor == "m" else x) / HALF) * HALF
        middle = y // GRID * GRID + HALF
        self.draw.text((left, middle), text, fill=fill, font=font, anchor="lm")
        return left + length

    def badge(self, x: int, y: int) -> tuple[int, int]:
        self.draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=BADGE)
        digit = str(self.rng.randint(1, 9))
        left = round(x - _font(10).getlength(digit) / 2)
        self.draw.text((left, y), digit, fill=(255, 255, 255), font=_font(10), anchor="lm")
        return x, y

    def pick_badges(self, count: int) -> set[int]:
        return set(self.rng.sample(range(count), min(self.badges_left, count)))

    def status_bar(self) -> None:
        width = self.image.width
        clock = f"{self.rng.randint(0, 23):02d}:{self.rng.randint(0, 59):02d}"
        self.text(7, 7, clock, 11, self.theme.text, "l")
        charge = self.rng.randint(1, 14)
        self.draw.rectangle((width - 26, 3, width - 9, 10), outline=self.theme.text)
        self.draw.rectangle((width - 25, 4, width - 25 + charge, 9), fill=self.theme.text)

    def title_bar(self, top: int, left: int, right: int) -> Box:
        box = left, top, right, bottom = self.scaled((left, top, right, top + TITLE_BAR))
        middle = (top + bottom) // 2
        if self.layout.centred:
            self.text((left + right) / 2, middle, self.title, 15, self.theme.text)
        else:
            self.text(left + 7, middle, self.title, 15, self.theme.text, "l")
        return box

    def app(self, label: str, box: Box, badge: bool) -> None:
        x0, y0, x1, y1 = box = self.scaled(box)
        above = (y1 - y0 - APP_HEIGHT) // 2
        left, top = round((x0 + x1 - 28) / 2 / HALF) * HALF, y0 + above + 7
        self.icon(label, left, top, 28)
        self.text((x0 + x1) / 2, y0 + above + 49, label, 12, self.theme.text)
        centre = self.badge(left + 27, top + 3) if badge else None
        self.elements.append(Element("app", label, box, centre))

    def icon(self, label: str, left: int, top: int, side: int) -> None:
        """The look of an icon follows from its label: a colour and a glyph that no other has."""
        index = (APPS + ROWS).index(label)
        colour = _PALETTE[index % len(_PALETTE)]
        right, bottom = left + side - 1, top + side - 1
        self.draw.rounded_rectangle((left, top, right, bottom), side // 4, fill=colour)
        a, b = side // 4, side - 1 - side // 4
        inner = (left + a, top + a, left + b, top + b)
        mid = (inner[0] + inner[2]) // 2
        white = (255, 255, 255)
        match index // len(_PALETTE) % 6:
            case 0:
                self.draw.ellipse(inner, fill=white)
            case 1:
                self.draw.rectangle(inner, fill=white)
            case 2:
                corners = [(mid, inner[1]), (inner[2], inner[3]), (inner[0], inner[3])]
                self.draw.polygon(corners, fill=white)
            case 3:
                for y in range(inner[1], inner[3] + 1, 5):
                    self.draw.line((inner[0], y, inner[2], y), fill=white, width=2)
            case 4:
                self.draw.ellipse(inner, outline=white, width=3)
            case 5:
                self.draw.line((mid, inner[1], mid, inner[3]), fill=white, width=3)
                middle = (inner[1] + inner[3]) // 2
                self.draw.line((inner[0], middle, inner[2], middle), fill=white, width=3)

    def button(self, label: str, box: Box, filled: bool) -> None:
        x0, y0, x1, y1 = box = self.scaled(box)
        shape = (x0 + 2, y0 + 2, x1 - 3, y1 - 3)
        if filled:
            self.draw.rounded_rectangle(shape, 8, fill=self.theme.accent)
        else:
            self.draw.rounded_rectangle(shape, 8, outline=self.theme.accent)
        fill = self.theme.on_accent if filled else self.theme.accent
        self.text((x0 + x1) / 2, (y0 + y1) // 2, label, 13, fill)
        self.elements.append(Element("button", label, box))

    def field(self, label: str, box: Box) -> None:
        x0, y0, x1, y1 = box = self.scaled(box)
        frame = (x0 + 1, y0 + 3, x1 - 2, y1 - 4)
        focused, typed = label == self.look.focus, self.look.typed.get(label, "")
        outline, width = (self.theme.accent, 3) if focused else (self.theme.faint, 1)
        self.draw.rectangle(frame, fill=self.theme.panel, outline=outline, width=width)
        middle, shown = (y0 + y1) // 2, typed or label
        cursor = self.text(x0 + 7, middle, shown, 13, self.theme.text, "l") + 2
        if focused:
            self.draw.line(
                (cursor, middle - 9, cursor, middle + 8), fill=self.theme.accent, width=2
            )
        self.elements.append(Element("field", label, box, None, focused, typed))

    def row(self, label: str, box: Box, badge: bool) -> None:
        x0, y0, x1, y1 = box = self.scaled(box)
        middle = (y0 + y1) // 2
        self.draw.line((x0 + 6, y1 - 1, x1 - 7, y1 - 1), fill=self.theme.faint)
        left = x0 + 7
        if self.layout.extra:
            self.icon(label, left, middle - 10, 20)
            left += 28
        self.text(left, middle, label, 13, self.theme.text, "l")
        self.text(x1 - 12, middle, ">", 13, self.theme.faint)
        centre = self.badge(x1 - 30, middle) if badge else None
        self.elements.append(Element("row", label, box, centre))


def _grid(canvas: _Canvas, top: int) -> None:
    layout, rng = canvas.layout, canvas.rng
    dock = APP_HEIGHT if layout.extra else 0
    left = layout.margin
    cell_width = (layout.width - 2 * left) // layout.columns
    spare = layout.height - dock - top - layout.rows * APP_HEIGHT
    cell_height = APP_HEIGHT + (GRID if spare >= layout.rows * GRID else 0)
    rows = layout.rows
    count = rows * layout.columns + (layout.columns if dock else 0)
    labels = rng.sample([app for app in APPS if app != canvas.title], count)
    badges = canvas.pick_badges(count)
    for i, label in enumerate(labels):
        row, column = divmod(i, layout.columns)
        x = left + column * cell_width
        y = top + row * cell_height if row < rows else layout.height - dock
        if row == rows and column == 0:
            bar = canvas.scaled((0, y, layout.width, layout.height))
            canvas.draw.rectangle(bar, fill=canvas.theme.panel)
        canvas.app(label, (x, y, x + cell_width, y + APP_HEIGHT), i in badges)


def _list(canvas: _Canvas, top: int) -> None:
    layout, rng = canvas.layout, canvas.rng
    count = layout.rows
    height = LINE + 2 * GRID if top + count * (LINE + 2 * GRID) <= layout.height else LINE
    badges = canvas.pick_badges(count)
    labels = rng.sample([row for row in ROWS if row != canvas.title], count)
    for i, label in enumerate(labels):
        y = top + i * height
        box = (layout.margin, y, layout.width - layout.margin, y + height)
        canvas.row(label, box, i in badges)


def _buttons(canvas: _Canvas, labels: list[str], box: Box, columns: int) -> int:
    """Buttons `columns` a line from the top of `box` on; returns the first free y."""
    x0, y, x1, _ = box
    for start in range(0, len(labels), columns):
        line = labels[start : start + columns]
        width = (x1 - x0) // len(line)
        for i, label in enumerate(line):
            left = x0 + i * width
            canvas.button(label, (left, y, left + width, y + LINE), filled=(start + i) % 2 == 0)
        y += LINE
    return y


def _button_labels(canvas: _Canvas) -> list[str]:
    return [label for label in LABELS["button"] if label != canvas.title]


def _form(canvas: _Canvas, top: int) -> None:
    layout, rng = canvas.layout, canvas.rng
    left, right = layout.margin, layout.width - layout.margin
    y = top
    for label in rng.sample(LABELS["field"], layout.rows):
        canvas.field(label, (left, y, right, y + LINE))
        y += LINE
    y += rng.choice((0, GRID)) if y + LINE + GRID <= layout.height else 0
    lines = 1 if y + 2 * LINE > layout.height else rng.choice((1, 2))
    choice = _button_labels(canvas)
    labels = rng.sample(choice, min(layout.columns * lines, len(choice)))
    _buttons(canvas, labels, (left, y, right, layout.height), layout.columns)


def _dialog(canvas: _Canvas) -> Box:
    layout, rng = canvas.layout, canvas.rng
    columns = 1 if layout.extra else layout.columns
    count = layout.rows * layout.columns
    lines = -(-count // columns)
    height = TITLE_BAR + 2 * GRID + LINE * lines
    left, right = layout.margin, layout.width - layout.margin
    room = (layout.height - STATUS_BAR - height) // GRID
    top = STATUS_BAR + GRID * rng.randint(0, room)
    x0, y0, x1, y1 = canvas.scaled((left, top, right, top + height))
    panel = (x0, y0, x1 - 1, y1 - 1)
    canvas.draw.rounded_rectangle(panel, 10, fill=canvas.theme.panel, outline=canvas.theme.faint)
    title_box = canvas.title_bar(top, left, right)
    y = title_box[3] + 2
    for end in (rng.uniform(0.5, 0.9), rng.uniform(0.3, 0.8)):
        stop = x0 + 9 + round((x1 - x0 - 18) * end)
        canvas.draw.line((x0 + 9, y, stop, y), fill=canvas.theme.faint, width=3)
        y += 9
    labels = rng.sample(_button_labels(canvas), count)
    y = top + TITLE_BAR + GRID
    _buttons(canvas, labels, (left + 7, y, right - 7, layout.height), columns)
    return title_box


def draw(layout: Layout, rng: Random, look: Look | None = None) -> Screen:
    """Draws one screen of `layout`; all that layout and look leave open comes from `rng`."""
    look = look or Look()
    canvas = _Canvas(layout, rng, look)
    canvas.status_bar()
    if layout.family == "dialog":
        title_box = _dialog(canvas)
    else:
        title_box = canvas.title_bar(STATUS_BAR, layout.margin, layout.width - layout.margin)
        body = {"home": _grid, "list": _list, "form": _form}[layout.family]
        body(canvas, STATUS_BAR + TITLE_BAR)
    return Screen(layout, canvas.image, canvas.title, title_box, tuple(canvas.elements))
