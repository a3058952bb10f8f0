"""Where images come from and what a request may hold: the policy for inputs, files and URLs."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from glmcompile.errors import InputError

_URL_SAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class InputPolicy:
    """What a request may hold and where its images may come from.

    The defaults (`OWN`) suit a program that passes its own inputs, `SERVED` strangers' requests.

    open_paths: a string that is no URL is a path, and any file may be opened.
    media_path: folder whose files `file://` URLs may name; None for no folder.
    remote_hosts: patterns (`*.example.com`, `example.com:8443`) of hosts whose `https://` images
        are fetched; none by default.
    fetch_timeout: seconds for fetching one image, redirects included.
    max_images: of one request.
    max_encoded_bytes: of one image's file.
    max_source_pixels: width times height of one image's file, counted before it is decoded.
    max_pixels: lowers the image processor's own bound on the resized image.
    max_characters: of one request's text.
    None means no bound.
    """

    open_paths: bool = True
    media_path: Path | None = None
    remote_hosts: tuple[str, ...] = ()
    fetch_timeout: float = 10.0
    max_images: int | None = None
    max_encoded_bytes: int = 256 << 20
    max_source_pixels: int = 178_956_970  # what Pillow calls a decompression bomb
    max_pixels: int | None = None
    max_characters: int | None = None


OWN = InputPolicy()
SERVED = InputPolicy(
    open_paths=False,
    max_images=10,
    max_encoded_bytes=32 << 20,
    max_source_pixels=50_000_000,  # 200 MB decoded
    max_characters=4_000_000,
)


@dataclass(frozen=True)
class ImageSource:
    """An image as it was given, and its place in the request, by which errors name it."""

    source: Any
    where: str


def read_image(image: ImageSource, policy: InputPolicy) -> Any:
    """Encoded bytes of a path, URL or bytes; Pillow images and arrays as they are.

    Raises InputError for what is missing, malformed, too large, or not allowed by the policy. For a
    file below `media_path` and for one that is not there the error is the same.
    """
    source, where = image.source, image.where
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str):
        data = _read_string(source, where, policy)
    elif isinstance(source, Path) and policy.open_paths:
        data = _read_file(source, f"{where}: no such image file", policy)
    elif isinstance(source, Image.Image | np.ndarray):
        return source
    else:
        raise InputError(
            f"{where}: not an image; give a path, a data: URL, bytes, a Pillow image or an array"
        )
    if len(data) > policy.max_encoded_bytes:
        raise _too_large(where, policy)
    return data


def _read_string(source: str, where: str, policy: InputPolicy) -> bytes:
    scheme = source[:8].partition(":")[0].lower()
    if scheme == "data":
        return _decode_data_url(source, where, policy)
    if scheme in ("http", "https"):
        from glmcompile.runtime.fetch import fetch  # TLS takes long to import, and few need it

        return fetch(
            source, where, policy.remote_hosts, policy.fetch_timeout, policy.max_encoded_bytes
        )
    if scheme == "file":
        return _read_file_url(source, where, policy)
    if policy.open_paths:
        return _read_file(Path(source), f"{where}: no such image file", policy)
    raise InputError(f"{where}: paths are not opened; give the image as data:image/png;base64,...")


def _decode_data_url(url: str, where: str, policy: InputPolicy) -> bytes:
    """The bytes of a base64 data: URL (RFC 2397). What is in them says the format, not the header.

    Strict, since base64 with characters dropped or bits left over is another image than was sent.
    Allowed are line breaks and spaces (`base64` and MIME encoders wrap lines), the URL-safe
    alphabet, and its usual omission of the padding (RFC 4648, sections 3.2 and 5).
    """
    comma = url.find(",", 0, 256)
    if comma < 0 or not url[:comma].lower().endswith(";base64"):
        raise InputError(f"{where}: expected a URL of the form data:image/png;base64,...")
    if (len(url) - comma) // 4 * 3 > 2 * policy.max_encoded_bytes:  # even if half is line breaks
        raise _too_large(where, policy)
    payload = url[comma + 1 :]
    try:
        return binascii.a2b_base64(payload, strict_mode=True)
    except ValueError:
        pass
    try:
        text = payload.encode("ascii").translate(_URL_SAFE, b" \t\r\n")
        if b"=" not in text:
            text += b"=" * (-len(text) % 4)
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        reason = "other characters" if isinstance(error, UnicodeError) else error
        raise InputError(f"{where}: the data URL holds no valid base64 ({reason})") from error


def _read_file_url(url: str, where: str, policy: InputPolicy) -> bytes:
    if policy.media_path is None and not policy.open_paths:
        raise InputError(
            f"{where}: file:// URLs are not allowed here; give the image as "
            "data:image/png;base64,..."
        )
    refusal = f"{where}: no image file of that name may be opened"
    try:
        parts = urlsplit(url)
        path = Path(unquote(parts.path, errors="strict"))
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise InputError(refusal)
        if not policy.open_paths:
            assert policy.media_path is not None
            # Links and `..` are followed first, and the file they lead to is judged.
            path = path.resolve(strict=True)
            if not path.is_relative_to(policy.media_path.resolve(strict=True)):
                raise InputError(refusal)
    except (OSError, ValueError, RuntimeError):
        raise InputError(refusal) from None
    return _read_file(path, refusal, policy, os.O_NOFOLLOW if not policy.open_paths else 0)


def _read_file(path: Path, refusal: str, policy: InputPolicy, flags: int = 0) -> bytes:
    """A regular file's bytes, at most one more than the policy allows."""
    try:
        # Non-blocking, or opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(refusal)
            return file.read(policy.max_encoded_bytes + 1)
    except (OSError, ValueError):  # a name that the file system cannot hold, too
        raise InputError(refusal) from None


def _too_large(where: str, policy: InputPolicy) -> InputError:
    return InputError(
        f"{where}: the image's file is larger than {policy.max_encoded_bytes:,} bytes; "
        "scale it down first"
    )
