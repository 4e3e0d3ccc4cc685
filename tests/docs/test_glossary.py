"""The pages explain every word that a record or a configuration may hold."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from lightning_nanguard import NaNGuard
from lightning_nanguard.act.defaults import executors
from lightning_nanguard.diagnosis.mistakes import MISTAKES
from lightning_nanguard.diagnosis.rules import RULES
from lightning_nanguard.record import messages, summary

ROOT = Path(__file__).parents[2]


@cache
def nodes() -> list[ast.AST]:
    """Every expression and statement of the package."""
    files = sorted((ROOT / "lightning_nanguard").rglob("*.py"))
    return [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def explained() -> dict[str, set[str]]:
    """The words in the first column of the tables, by the section of the glossary."""
    sections = re.split(r"^## ", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    rows = re.compile(r"^\| ([^|]+) \|", re.MULTILINE)
    return {
        section.splitlines()[0]: {word for cell in rows.findall(section) for word in re.findall(r"`([^`]+)`", cell)}
        for section in sections
    }


def calls(*names: str) -> Iterator[ast.Call]:
    """Every call in the package of a function or method of one of these names."""
    for node in nodes():
        if isinstance(node, ast.Call):
            called = node.func
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            if name in names:
                yield node


def literals(*nodes: ast.AST) -> set[str]:
    """The words among these expressions: literals, also within tuples and conditions."""
    return {
        part.value
        for node in nodes
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and re.fullmatch("[a-z_ ]+", part.value)
    }


def faults() -> set[str]:
    """Every kind of fault that the package makes."""
    return literals(*(call.args[0] for call in calls("Fault", "_suspicion") if call.args))


def causes() -> set[str]:
    """Every cause that a built-in rule names, and every other one that the package makes."""
    found = {rule.__name__ for rule in (*RULES, *MISTAKES)}
    found |= literals(
        *(
            call.args[0]
            for call in calls("Finding", "finding", "finding_at", "outlier_finding", "_advise", "_say")
            if call.args
        )
    )
    assigned = [node for node in nodes() if isinstance(node, ast.Assign)]
    return found | literals(
        *(node.value.body for node in assigned if _is_cause(node) and isinstance(node.value, ast.IfExp)),
        *(node.value.orelse for node in assigned if _is_cause(node) and isinstance(node.value, ast.IfExp)),
    )


def _is_cause(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "cause" for target in node.targets)


def remedies() -> set[str]:
    """Every word that a record may hold for what was done."""
    found = {*messages._PHRASES, *summary._ACTIONS, *(remedy.word for remedy in executors(()).values())}
    recorded = (arg for call in calls("record", "_record", "note", "_note") for arg in call.args[1:])
    return found | literals(*(arg for arg in recorded if not isinstance(arg, (ast.Call, ast.JoinedStr))))


def arguments() -> set[str]:
    """Every argument of the constructor."""
    return set(inspect.signature(NaNGuard).parameters)


@pytest.mark.parametrize(
    ("section", "found"),
    [
        ("Faults", faults),
        ("What was done", remedies),
    ],
)
def test_every_word_is_explained(section: str, found: Callable[[], set[str]]) -> None:
    """The glossary has a row for each word, and none for a word that is gone."""
    words, rows = found(), explained()[section]
    assert len(words) > 10
    assert not (missing := sorted(words - rows)), f'no row under "{section}" of docs/glossary.md: {", ".join(missing)}'
    assert not (gone := sorted(rows - words)), f'"{section}" of docs/glossary.md, but unused: {", ".join(gone)}'


def test_every_argument_is_explained() -> None:
    """The docstring of the guard, which the Python reference shows, has an entry for each argument."""
    found = arguments()
    assert len(found) > 10
    entries = set(re.findall(r"^    (\w+): ", inspect.cleandoc(NaNGuard.__doc__ or ""), re.MULTILINE))
    assert not (missing := sorted(found - entries)), f"not in the docstring of NaNGuard: {', '.join(missing)}"
