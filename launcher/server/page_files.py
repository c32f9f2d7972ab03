"""The static files of the status page: path, content type, and security headers."""

from dataclasses import dataclass
from pathlib import Path

PAGE_FOLDER = Path(__file__).with_name("page")

_HTML, _CSS, _SCRIPT = (f"text/{kind}; charset=utf-8" for kind in ("html", "css", "javascript"))

PAGE_FILES = {
    "/": ("index.html", _HTML),
    "/page.css": ("page.css", _CSS),
    "/page.js": ("page.js", _SCRIPT),
    "/chat.js": ("chat.js", _SCRIPT),
    "/answer.js": ("answer.js", _SCRIPT),
    "/settings.js": ("settings.js", _SCRIPT),
    "/stream.js": ("stream.js", _SCRIPT),
    "/markdown.js": ("markdown.js", _SCRIPT),
    "/marked.js": ("marked.js", _SCRIPT),
    "/status.js": ("status.js", _SCRIPT),
    "/ranks.js": ("ranks.js", _SCRIPT),
    "/charts.js": ("charts.js", _SCRIPT),
    "/elements.js": ("elements.js", _SCRIPT),
    "/numbers.js": ("numbers.js", _SCRIPT),
}
"""Maps URL paths to file names and content types."""

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Allows scripts, styles and requests of this server only."""


@dataclass(frozen=True, slots=True)
class PageFile:
    """The content served for one path."""

    content: bytes
    content_type: str


def read_page_files() -> dict[str, PageFile]:
    """Read every file of the page, keyed by URL path."""
    return {path: PageFile((PAGE_FOLDER / name).read_bytes(), content_type) for path, (name, content_type) in PAGE_FILES.items()}
