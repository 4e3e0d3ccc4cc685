"""Gives the package index a README whose links work there; everything else is in pyproject.toml.

A link to a file of the repository means nothing on a package index. With the address of the repository in
``project.urls`` it becomes an absolute one. Without an address the words of a link stay, and the link and the pictures
go.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_IMAGE = re.compile(r"!\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")


def repository(pyproject: str) -> str | None:
    """Address of the repository that pyproject.toml names, ``None`` where it names none."""
    found = re.search(r'^Repository = "(https://[^"]+?)/?"', pyproject, re.MULTILINE)
    return found[1] if found else None


def for_index(readme: str, address: str | None, version: str) -> str:
    """The README as a package index shows it.

    Args:
        readme: Text of README.md.
        address: Address of the repository.
        version: Version of the package; its links lead to the files of that version.
    """
    if address is None:
        return _LINK.sub(r"\1", _IMAGE.sub("", readme))
    readme = _IMAGE.sub(rf"![\1]({address}/raw/v{version}/\2)", readme)
    return _LINK.sub(rf"[\1]({address}/blob/v{version}/\2)", readme)


if __name__ == "__main__":
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', pyproject, re.MULTILINE)
    assert version is not None
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=for_index(text, repository(pyproject), version[1]),
        long_description_content_type="text/markdown",
    )
