"""Drawing in a layout's pixels on a picture of any scale, with Pillow's built-in font."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


class Pen:
    """Draws in a layout's pixels on a picture `scale` times as large."""

    def __init__(self, image: Image.Image, scale: float):
        self._draw, self.scale = ImageDraw.Draw(image), scale

    def _near(self, values: Sequence[float]) -> tuple[int, ...]:
        return tuple(round(value * self.scale) for value in values)

    def _box(self, box: Sequence[float]) -> tuple[int, ...]:
        """The corners given are the first and the last pixel inside."""
        x1, y1 = self._near((box[2] + 1, box[3] + 1))
        return (*self._near(box[:2]), x1 - 1, y1 - 1)

    def _styled(self, style: dict[str, Any]) -> dict[str, Any]:
        return style | {"width": round(style.get("width", 1) * self.scale)}

    def rectangle(self, box: Sequence[float], **style: Any) -> None:
        self._draw.rectangle(self._box(box), **self._styled(style))

    def rounded_rectangle(self, box: Sequence[float], radius: float, **style: Any) -> None:
        self._draw.rounded_rectangle(self._box(box), radius * self.scale, **self._styled(style))

    def ellipse(self, box: Sequence[float], **style: Any) -> None:
        self._draw.ellipse(self._box(box), **self._styled(style))

    def polygon(self, corners: Sequence[Sequence[float]], fill: Colour) -> None:
        self._draw.polygon([self._near(corner) for corner in corners], fill=fill)

    def line(self, ends: Sequence[float], **style: Any) -> None:
        self._draw.line(self._near(ends), **self._styled(style))

    def text(
        self, x: float, y: float, text: str, size: int, fill: Colour, anchor: str, snap: int = 1
    ) -> float:
        """Writes with Pillow's anchor, "l" or "m", vertically centred; returns where the text ends.

        snap: the layout's pixels that the text's beginning is a multiple of.
        """
        font = _font(round(size * self.scale))
        length = font.getlength(text) / self.scale
        left = round((x - length / 2 if anchor == "m" else x) / snap) * snap
        self._draw.text(
            (round(left * self.scale), round(y * self.scale)),
            text,
            fill=fill,
            font=font,
            anchor="lm",
        )
        return left + length
