"""Shows the cross references of docstrings (``:class:`NaNGuard```) as code; used by mkdocs alone."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?([^`]+)`")


class Roles(griffe.Extension):
    """Replaces each role by the last part of the name it refers to."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring:
            text = re.sub(r"``([^`]+)``", r"`\1`", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2]}`", text)
