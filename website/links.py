"""Makes pages of the repository fit for the site: where their links lead, and how their lists are indented."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "RELEASING.md": "releases.md",
    "SECURITY.md": "security.md",
}
"""Files outside docs/ that are pages of the site."""

_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
_NAMED_BY_FILE = re.compile(r"\[[\w/]+\.md\]\(([^)\s#]+\.md)(#[^)]*)?\)")
_ITEM = re.compile(r"( *)(?:[-*]|\d+\.) +")


def targets(markdown: str, folder: str) -> set[str]:
    """Files and folders of the repository that a page links to.

    Args:
        markdown: Text of the page.
        folder: Folder of the page in the repository, ``""`` for the root.
    """
    found = {posixpath.normpath(posixpath.join(folder, link)) for link in _LINK.findall(markdown)}
    return {path for path in found if (ROOT / path).exists()}


def site_path(path: str) -> str:
    """Where a file or folder of the repository is on the site, as the path of a source file of the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if path.endswith((".json", ".png")) else f"source/{path}.md"


def relink(markdown: str, folder: str, page: str) -> str:
    """The page with its relative links changed from places in the repository to places on the site.

    Args:
        markdown: Text of the page.
        folder: Folder of the page in the repository, ``""`` for the root.
        page: Path of the page on the site.
    """

    def replace(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / path).exists():
            return match[1]
        return posixpath.relpath(site_path(path), posixpath.dirname(page) or ".")

    return _LINK.sub(replace, _NAMED_BY_FILE.sub(lambda match: _titled(match, folder), markdown))


def _titled(match: re.Match[str], folder: str) -> str:
    """A link whose words are the name of a file, with the title of that page in their place."""
    path = ROOT / folder / match[1]
    heading = re.match(r"# (.+)\n", path.read_text(encoding="utf-8")) if path.exists() else None
    return f"[{heading[1]}]({match[1]}{match[2] or ''})" if heading else match[0]


def indent_lists(markdown: str) -> str:
    """The page with what belongs to a list item indented by four spaces a level, as Python-Markdown demands."""
    lines: list[str] = []
    levels: list[int] = []  # where the text of each open item begins
    fence = ""
    for line in markdown.splitlines():
        text = line.lstrip(" ")
        indent = len(line) - len(text)
        while text and not fence and levels and indent < levels[-1]:
            levels.pop()
        lines.append(" " * (4 * len(levels) + indent - (levels[-1] if levels else 0)) + text if text else "")
        if text.startswith("```"):
            fence = "" if fence else text
        elif not fence and (item := _ITEM.match(line)):
            levels.append(len(item[0]))
    return "\n".join(lines) + "\n"
