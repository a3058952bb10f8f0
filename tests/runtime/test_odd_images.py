"""Odd, hostile and damaged image files: transformers' pixels or an InputError, and nothing else."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from glmcompile.errors import InputError
from glmcompile.runtime.image_decoder import FORMATS, decode_rgb
from glmcompile.runtime.image_processor import ImageProcessor, image_processor
from glmcompile.runtime.media import OWN, SERVED
from tests.runtime import reference
from tests.runtime.conftest import TinyModel
from tests.runtime.images import noise

MOST = 1_000_000


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, *[0] * 6)


def gif(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x00;"


def frames(count: int = 3) -> list[Image.Image]:
    return [noise(64, 60, seed) for seed in range(count)]


PALETTE = noise(64, 60).quantize(16)
GREY16 = Image.fromarray((np.arange(64 * 60).reshape(60, 64) * 17).astype(np.uint16))

ODD = {
    "animated GIF": encoded(frames()[0], "GIF", save_all=True, append_images=frames()[1:]),
    "animated WebP": encoded(frames()[0], "WEBP", save_all=True, append_images=frames()[1:]),
    "animated PNG": encoded(frames()[0], "PNG", save_all=True, append_images=frames()[1:]),
    "CMYK JPEG": encoded(noise(64, 60, mode="CMYK"), "JPEG"),
    "grey JPEG": encoded(noise(64, 60, mode="L"), "JPEG"),
    "16-bit grey PNG": encoded(GREY16, "PNG"),
    "16-bit colour PNG": png(40, 30, b"".join(b"\0" + bytes(range(240)) for _ in range(30)), 16),
    "1-bit PNG": encoded(noise(64, 60).convert("1"), "PNG"),
    "palette PNG": encoded(PALETTE, "PNG"),
    "transparent palette PNG": encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
    "PNG with a transparent colour": encoded(
        PALETTE.convert("RGB"), "PNG", transparency=PALETTE.convert("RGB").getpixel((9, 9))
    ),
    "grey and alpha PNG": encoded(noise(64, 60, mode="LA"), "PNG"),
    "alpha WebP": encoded(noise(64, 60, mode="RGBA"), "WEBP", lossless=True),
    "palette GIF": encoded(PALETTE, "GIF", transparency=3),
    "BMP": encoded(noise(64, 60), "BMP"),
    "one pixel": encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"),
    "one pixel with alpha": encoded(Image.new("RGBA", (1, 1), (9, 8, 7, 0)), "PNG"),
    "progressive JPEG": encoded(noise(64, 60), "JPEG", progressive=True),
    "trailing junk": encoded(noise(64, 60), "PNG") + b"junk" * 100,
}


@pytest.fixture(scope="module")
def processors(tiny_model: Callable[[str], TinyModel]) -> tuple[ImageProcessor, Any]:
    """Ours and transformers'."""
    model = tiny_model("glm4v")
    ours = image_processor(model.vision, model.directory)
    return ours, reference.image_processor(model.directory, "glm4v")


@pytest.mark.parametrize("name", ODD)
def test_odd_files_equal_transformers(
    processors: tuple[ImageProcessor, Any], tmp_path: Path, name: str
) -> None:
    ours, theirs = processors
    file = tmp_path / "image"
    file.write_bytes(ODD[name])
    result, expected = ours(ODD[name], SERVED), theirs(str(file))
    assert result.grid_thw == tuple(np.asarray(expected["image_grid_thw"])[0])
    values = np.ascontiguousarray(expected["pixel_values"])
    assert result.pixel_values.tobytes() == values.tobytes()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_an_animation_shows_its_first_frame(
    processors: tuple[ImageProcessor, Any], form: str
) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    still = [frame.quantize(8).convert("RGB") for frame in frames()]
    moving = encoded(still[0], form, save_all=True, append_images=still[1:], **options)
    assert Image.open(BytesIO(moving)).n_frames == 3
    first, second = processors[0](still[0]).digest, processors[0](still[1]).digest
    assert processors[0](moving).digest == first != second


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_every_exif_orientation_equals_transformers(
    processors: tuple[ImageProcessor, Any], tmp_path: Path, orientation: int, form: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "image"
    file.write_bytes(encoded(noise(90, 60), form, exif=exif))
    expected = processors[1](str(file))
    result = processors[0](file.read_bytes(), SERVED)
    assert result.grid_thw == tuple(np.asarray(expected["image_grid_thw"])[0])
    assert result.pixel_values.tobytes() == np.asarray(expected["pixel_values"]).tobytes()


def webp(width: int, height: int) -> bytes:
    """A lossy WebP's header alone."""
    frame = b"\x30\x01\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(64)
    body = b"WEBPVP8 " + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg(width: int, height: int) -> bytes:
    """A real JPEG whose header claims another size."""
    data = bytearray(encoded(noise(16, 16), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize(
    "bomb",
    [
        png(100_000, 100_000), png(2**31 - 1, 1), png(1_000, 1_001), bmp(100_000, 100_000),
        bmp(10_000, -10_000), gif(65_535, 65_535), gif(1_001, 1_000), jpeg(65_500, 65_500),
        jpeg(1_001, 1_000), webp(16_383, 16_383), webp(1_001, 1_000),
    ],
)  # fmt: skip
def test_pixels_are_counted_before_they_are_decoded(
    bomb: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(InputError, match=r"too many pixels|more than 1,000,000"):
        decode_rgb(bomb, "images[0]", MOST)


def test_a_bomb_takes_no_memory() -> None:
    """A few hundred bytes that would be 30 GB."""
    program = (
        "import resource, sys\n"
        "from tests.runtime.test_odd_images import png, gif, webp, decode_rgb, InputError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for bomb in (png(100_000, 100_000), gif(65_535, 65_535), webp(16_383, 16_383)):\n"
        "    try:\n        decode_rgb(bomb, 'x', 50_000_000)\n"
        "    except InputError:\n        continue\n    sys.exit('decoded')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50_000  # KiB
    assert done.stderr == ""


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"hello, world", SVG, b"<?xml version='1.0'?>" + SVG, b"%PDF-1.7", b"GIF89a"],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"images\[0\]: not a readable image"):
        decode_rgb(data, "images[0]", MOST)


@pytest.mark.parametrize("form", ["TIFF", "JPEG2000", "ICO", "PPM", "TGA", "AVIF", "PDF", "EPS"])
def test_rare_decoders_cannot_be_reached(form: str) -> None:
    data = encoded(noise(64, 60), form)
    with pytest.raises(InputError, match=f"no known image format.*{FORMATS[0]}"):
        decode_rgb(data, "images[0]", MOST)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_truncated_files_are_refused(form: str, kept: float) -> None:
    data = encoded(noise(200, 180), form)
    with pytest.raises(InputError, match="not a readable image"):
        decode_rgb(data[: int(len(data) * kept)], "images[0]", MOST)


def test_text_chunks_cannot_fill_memory() -> None:
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(64 << 20)))
    data = ODD["one pixel"]
    after_header = 8 + 25
    with pytest.raises(InputError, match="not a readable image"):
        decode_rgb(data[:after_header] + text * 3 + data[after_header:], "x", MOST)


def test_pillows_warnings_reach_nobody() -> None:
    """A palette with partial transparency, EXIF that is cut, a large picture: Pillow warns."""
    program = (
        "import struct\n"
        "from tests.runtime.test_odd_images import *\n"
        "exif = b'Exif\\0\\0II*\\0' + struct.pack('<IH', 8, 200) + bytes(30)\n"
        "cut = encoded(noise(64, 60), 'JPEG', exif=exif)\n"
        "for data in (cut, ODD['transparent palette PNG']):\n"
        "    decode_rgb(data, 'x', MOST)\n"
        "try:\n    decode_rgb(png(10_000, 10_000), 'x', MOST)\nexcept InputError:\n    pass\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


SEEDS = [
    encoded(noise(40, 30), "PNG"),
    encoded(noise(40, 30).quantize(16), "PNG", transparency=2),
    encoded(noise(40, 30), "JPEG"),
    encoded(noise(40, 30, mode="CMYK"), "JPEG", progressive=True),
    encoded(noise(40, 30), "WEBP"),
    encoded(noise(40, 30, mode="RGBA"), "WEBP", lossless=True),
    ODD["animated WebP"],
    ODD["animated GIF"],
    ODD["animated PNG"],
    ODD["BMP"],
]


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=st.sampled_from(SEEDS),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from("rid"), st.binary(min_size=1, max_size=4)),
        min_size=1,
        max_size=8,
    ),
)
def test_mutated_files_are_images_or_input_errors(
    processors: tuple[ImageProcessor, Any],
    data: bytes,
    edits: list[tuple[float, str, bytes]],
) -> None:
    changed = bytearray(data)
    for where, kind, piece in edits:
        # Most of what can go wrong is near the beginning.
        place = int(where**2 * len(changed))
        stop = place + (0 if kind == "i" else len(piece))
        changed[place:stop] = b"" if kind == "d" else piece
    policy = replace(OWN, max_source_pixels=MOST)
    try:
        result = processors[0](bytes(changed), policy)
    except InputError:
        return
    assert result.pixels.shape[2] == 3
