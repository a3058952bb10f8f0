"""Pieces of requests that several tests send."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from tests.runtime.images import noise

CHAT = "/v1/chat/completions"
SCREEN = Path("calibration/screenshot.png")
# The reference model answers at length only if it may not end.
LONG = {"ignore_eos": True, "repetition_penalty": 1.5}


def data_url(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def png(width: int, height: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    noise(width, height, seed).save(file, "PNG")
    return file.getvalue()


def ask(text: str, *images: bytes) -> list[dict[str, Any]]:
    """A user's turn, as the phone agent writes it."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def chat(**options: Any) -> dict[str, Any]:
    """A request that is answered greedily, in a word."""
    return {"messages": ask("Open Chat."), "temperature": 0, "max_tokens": 24, **options}
