"""What may be opened for a request: paths, file:// URLs, data: URLs, and their limits."""

from __future__ import annotations

import base64
import os
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from glmcompile.errors import InputError
from glmcompile.runtime.media import OWN, SERVED, ImageSource, InputPolicy, read_image
from tests.runtime.images import noise

WHERE = "messages[1].content[0]"


def read(source: object, policy: InputPolicy = OWN) -> bytes:
    return read_image(ImageSource(source, WHERE), policy)


def png() -> bytes:
    encoded = BytesIO()
    noise(30, 30).save(encoded, "PNG")
    return encoded.getvalue()


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with an image, beside a secret, with links inside it."""
    folder = tmp_path / "media"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a b.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "c.png").write_bytes(png())
    (folder / "out.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "in.png").symlink_to(folder / "sub" / "a b.png")
    os.mkfifo(folder / "pipe")
    return folder


def test_a_program_opens_its_own_paths(media: Path) -> None:
    file = media / "sub" / "a b.png"
    assert read(file) == read(str(file)) == read(file.as_uri()) == png()
    with pytest.raises(InputError, match="no such image file"):
        read(str(media / "pipe"))


def test_files_below_the_media_path_are_opened(media: Path) -> None:
    policy = replace(SERVED, media_path=media)
    assert read((media / "sub" / "a b.png").as_uri(), policy) == png()
    assert read((media / "in.png").as_uri(), policy) == png()
    assert read(f"file://localhost{media}/sub/a%20b.png", policy) == png()
    linked = media.parent / "linked"
    linked.symlink_to(media)
    assert read((media / "in.png").as_uri(), replace(SERVED, media_path=linked)) == png()


@pytest.mark.parametrize(
    "name",
    [
        "missing.png", "../secret.png", "out.png", "up/secret.png", "sub/../../secret.png",
        "%2e%2e/secret.png", "../media2/c.png", "pipe", "", "sub", "a%00b.png", "a%ff.png",
        "in.png?x", "in.png#x", "x" * 5000, "sub/a b.png/x",
    ],
)  # fmt: skip
def test_no_other_file_is_opened_and_none_betrays_itself(media: Path, name: str) -> None:
    policy = replace(SERVED, media_path=media)
    with pytest.raises(InputError) as raised:
        read(f"file://{media}/{name}", policy)
    assert str(raised.value) == f"{WHERE}: no image file of that name may be opened"
    assert raised.value.__cause__ is None
    with pytest.raises(InputError, match="no image file of that name"):
        read(f"file://host{media}/in.png", policy)


@pytest.mark.parametrize("source", ["/etc/passwd", "missing.png", "~/x.png", "\0", "C:\\a.png"])
def test_a_server_opens_no_path(media: Path, source: str) -> None:
    for policy in (SERVED, replace(SERVED, media_path=media)):
        with pytest.raises(InputError) as raised:
            read(source, policy)
        assert str(raised.value).startswith(f"{WHERE}: paths are not opened")
    with pytest.raises(InputError, match="not an image"):
        read(media / "in.png", SERVED)
    with pytest.raises(InputError, match="file:// URLs are not allowed"):
        read((media / "in.png").as_uri(), SERVED)


def test_data_urls_may_be_wrapped_url_safe_and_unpadded() -> None:
    # Bytes whose base64 holds both characters in which the alphabets differ, and padding.
    data = bytes(range(256)) + b"\xfb\xff\xfe"
    plain = base64.b64encode(data + b"1").decode()
    assert read("data:image/png;base64," + plain) == data + b"1"
    assert read("data:;base64," + plain) == data + b"1"
    assert read("DATA:image/png;charset=x;BASE64," + plain) == data + b"1"
    wrapped = base64.encodebytes(data + b"1").decode().replace("\n", "\r\n ")
    assert read("data:image/png;base64," + wrapped) == data + b"1"
    safe = base64.urlsafe_b64encode(data + b"1").decode()
    assert "-" in safe
    assert "_" in safe
    assert read("data:image/png;base64," + safe) == data + b"1"
    assert read("data:image/png;base64," + safe.rstrip("=")) == data + b"1"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("data:image/png,abc", "expected a URL of the form"),
        ("data:image/png;base64", "expected a URL of the form"),
        ("data:" + "x" * 300 + ";base64,AAAA", "expected a URL of the form"),
        ("data:image/png;base64,AA*A", "no valid base64"),
        ("data:image/png;base64,AAA%3D", "no valid base64"),
        ("data:image/png;base64,A", "no valid base64"),
        ("data:image/png;base64,AA=A", "no valid base64"),
        ("data:image/png;base64,AAA=AAA=", "no valid base64"),
        ("data:image/png;base64,AA=", "no valid base64"),
        ("data:image/png;base64,AAAä", "other characters"),
    ],
)
def test_other_data_urls_are_refused(url: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as raised:
        read(url)
    assert len(str(raised.value)) < 200
    assert str(raised.value).startswith(WHERE)


def test_encoded_bytes_are_counted_before_they_are_decoded(tmp_path: Path) -> None:
    policy = InputPolicy(max_encoded_bytes=1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    payload = base64.b64encode(bytes(1001)).decode()
    for source in (
        bytes(1001), f"data:;base64,{payload}", "data:;base64," + "*" * 10_000, tmp_path / "a.png",
        "file://" + str(tmp_path / "a.png"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="larger than 1,000 bytes"):
            read(source, policy)
    assert read(bytes(1000), policy) == bytes(1000)


@pytest.mark.parametrize("source", [None, 3, {"url": "x"}, ["a"], 1.5])
def test_other_things_are_no_images(source: object) -> None:
    with pytest.raises(InputError, match="not an image"):
        read(source)
