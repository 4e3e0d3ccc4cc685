"""Hooks of mkdocs: add pages from outside of docs/, and change links between files to links between pages."""

from __future__ import annotations

import json
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from website import thresholds_page
from website.links import PAGES, ROOT, indent_lists, relink, site_path, targets

_FENCES = {".py": "python", ".yaml": "yaml", ".toml": "toml", "": "text"}


def on_config(config: Any) -> Any:
    """Link to the repository once pyproject.toml names its address.

    ``repo_url`` is left empty: with it the theme asks the host of the repository for its stars.
    """
    named = re.search(r'^Repository = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    if named:
        config.extra["social"] = [{"icon": "material/git", "link": named[1], "name": "Repository"}]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/, and every source file that some page links to."""
    # Here, so that the other functions can be tested without mkdocs.
    from mkdocs.structure.files import File, InclusionLevel

    made = {PAGES[name]: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    linked = {path for name in PAGES for path in targets((ROOT / name).read_text(encoding="utf-8"), "")}
    for path in sorted((ROOT / "docs").glob("*.md")):
        linked |= targets(path.read_text(encoding="utf-8"), "docs")
    for path in sorted(linked):
        if path not in PAGES and not path.startswith("docs/"):
            made |= sources(path)
    made["thresholds.md"] = thresholds_page.page()
    for uri, content in made.items():
        listed = InclusionLevel.NOT_IN_NAV if uri.startswith("source/") else InclusionLevel.UNDEFINED
        files.append(File.generated(config, uri, content=content, inclusion=listed))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change the links of a page, and the indentation of its lists."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    return indent_lists(relink(markdown, "" if uri in PAGES.values() else "docs", uri))


def sources(path: str) -> dict[str, str]:
    """The pages, or the plain file, for a file or folder of the repository, by their paths on the site."""
    place = ROOT / path
    if place.is_dir():
        inside = sorted(one.relative_to(ROOT).as_posix() for one in place.rglob("*") if one.suffix in _FENCES)
        inside = [one for one in inside if (ROOT / one).is_file() and "__pycache__" not in one]
        home = posixpath.dirname(site_path(path))
        items = [f"- [{one}]({posixpath.relpath(site_path(one), home)})" for one in inside]
        return {site_path(path): "\n".join([f"# {path}", "", *items, ""])} | {
            uri: text for one in inside for uri, text in sources(one).items()
        }
    text = place.read_text(encoding="utf-8")
    if place.suffix == ".ipynb":
        text = notebook(json.loads(text))
    elif place.suffix != ".json":
        text = f"# {path}\n\n````{_FENCES.get(place.suffix, 'text')}\n{text}\n````\n"
    return {site_path(path): text}


def notebook(content: dict[str, Any]) -> str:
    """A notebook as a page: its texts, and its cells as code."""
    parts = []
    for cell in content["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"
