"""`/`: a page for people, which shows the model and its load and tries a prompt."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Response

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    """One file that loads nothing else and runs nothing but its own script."""
    text, policy = _page()
    return Response(
        text,
        media_type="text/html; charset=utf-8",
        headers={
            "cache-control": "no-cache",
            "content-security-policy": policy,
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        },
    )


@cache
def _page() -> tuple[str, str]:
    """The file and its Content-Security-Policy, which allows its style and script by their hash."""
    text = (files("glmcompile.serve") / "page.html").read_text(encoding="utf-8")
    allowed = {}
    for kind in ("style", "script"):
        found = re.search(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
        assert found is not None
        digest = b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        allowed[kind] = f"'sha256-{digest}'"
    policy = {
        "default-src": "'none'",
        "style-src": allowed["style"],
        "script-src": allowed["script"],
        "connect-src": "'self'",
        "img-src": "data:",  # of the image that was chosen
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in policy.items())
