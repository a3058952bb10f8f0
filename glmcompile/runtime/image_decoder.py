"""Image files to RGB: a few formats, limits that hold before decoding, one kind of error."""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, WebPImagePlugin

from glmcompile.errors import InputError

# What browsers, phones and screenshots write. Pillow's decoders of rarer formats are less tested
# and call more libraries (TIFF, JPEG 2000, AVIF); no file of a stranger reaches them. WebP's plugin
# is imported by name because Pillow would import its forty others to find it.
FORMATS = ("PNG", "JPEG", WebPImagePlugin.WebPImageFile.format, "GIF", "BMP")

# Of oddities in a file that is read all the same; nobody who sent one would see them.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_rgb(data: bytes, where: str, max_source_pixels: int) -> Image.Image:
    """An image file in RGB, as transformers' `load_image` and `convert_to_rgb` make it.

    That is upright by its EXIF orientation, without its alpha channel, and with a colour that the
    file declares transparent made white. Of an animation it is the first frame.
    Raises InputError for other formats than FORMATS, for damaged files, and for more pixels than
    allowed, which the file's header says.
    """
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_source_pixels:
            raise InputError(
                f"{where}: the image has {image.width}x{image.height} pixels, more than "
                f"{max_source_pixels:,}; scale it down first"
            )
        ImageOps.exif_transpose(image, in_place=True)  # in place, or an upright image is copied
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        # An alpha channel is lost by now, but not a colour that stands for transparency.
        return pillow_rgb(rgb, where)
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{where}: the image has too many pixels; scale it down first") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise InputError(
            f"{where}: not a readable image ({reason}); give a {', '.join(FORMATS)} file"
        ) from error


def pillow_rgb(image: Image.Image, where: str) -> Image.Image:
    """RGB over white, as transformers' `convert_to_rgb` for Pillow images.

    Raises InputError when its file, read only now, is damaged.
    """
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            rgba = image.convert("RGBA")
            background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return Image.alpha_composite(background, rgba).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:
        raise InputError(f"{where}: not a readable image ({error})") from error


def array_rgb(image: NDArray[Any], where: str) -> Image.Image:
    """RGB over white, as transformers' `convert_to_rgb` for arrays with channels last.

    Raises InputError for anything but uint8 [height, width] or [height, width, 1, 3 or 4].
    """
    pixels = image[:, :, None] if image.ndim == 2 else image
    if image.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise InputError(f"{where}: expected uint8 [height, width] or [height, width, 1, 3 or 4]")
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    elif pixels.shape[2] == 4:
        alpha = pixels[..., 3:] / 255
        pixels = np.round(alpha * pixels[..., :3] + (1 - alpha) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))
