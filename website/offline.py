"""Fails if a page of the built site loads anything from another host: ``python -m website.offline build/site``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_LINKS = {"stylesheet", "preload", "prefetch", "preconnect", "icon", "modulepreload"}
_CSS = re.compile(r"(?:@import\s+|url\()\s*['\"]?((?:https?:)?//[^'\")\s]+)")


class _Loads(HTMLParser):
    """Collects the addresses that a page loads without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        address = values.get(_LOADED.get(tag, ""), "")
        if tag == "link" and _LINKS & set(values.get("rel", "").split()):
            address = values.get("href", "")
        if re.match(r"(https?:)?//", address):
            self.found.append(address)


def loads(text: str, suffix: str) -> list[str]:
    """Addresses on other hosts that a page or a style sheet loads."""
    if suffix == ".css":
        return _CSS.findall(text)
    parser = _Loads()
    parser.feed(text)
    return parser.found + _CSS.findall(text)


def problems(site: Path) -> Iterator[str]:
    """One line for each address that a file of the site loads from elsewhere."""
    for path in sorted(site.rglob("*")):
        if path.suffix in {".html", ".css"}:
            for address in loads(path.read_text(encoding="utf-8"), path.suffix):
                yield f"{path.relative_to(site)} loads {address}"


def main(site: str) -> int:
    """Print what is loaded from elsewhere; 1 if there is any."""
    found = list(problems(Path(site)))
    print("\n".join(found) or f"{site}: nothing is loaded from another host")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
