"""A page for people at `/ui`, which asks `/v1` as any other client does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "ui"
INDEX = "index.html"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# What the page may do: load its own files, ask this router, and make no markup from texts.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # a new router may come with a new page
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """The page and its files, read once; they need no token, because they know nothing."""
    files = [file for file in sorted(FOLDER.iterdir()) if file.suffix in TYPES]
    return [Route(_path(file), _served(file), methods=["GET"]) for file in files]


def _path(file: Path) -> str:
    # the others lie below it, so that the page also works behind a prefix
    return "/ui" if file.name == INDEX else f"/ui/{file.name}"


def _served(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content, media_type = file.read_bytes(), TYPES[file.suffix]

    async def serve(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return serve
