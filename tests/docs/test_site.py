"""The pages of the documentation site are complete, and its tools do what they promise."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import lightning_nanguard
from lightning_nanguard.act.defaults import executors
from lightning_nanguard.cli.main import COMMANDS
from lightning_nanguard.record.base import Sink
from tests.docs.test_glossary import causes, literals, nodes
from website.hooks import notebook, sources
from website.links import PAGES, indent_lists, relink, site_path, targets
from website.offline import loads
from website.thresholds_page import classes, described, page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def sections(name: str, level: str = "##") -> dict[str, str]:
    """The sections of a page by their headings."""
    parts = re.split(rf"^{level} ", (DOCS / name).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: re.split(r"^#+ ", part, flags=re.MULTILINE)[0] for part in parts}


def test_every_page_is_in_the_navigation() -> None:
    """Each document can be reached, and no entry leads nowhere."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = {entry for group in yaml.safe_load(nav) for value in group.values() for entry in _entries(value)}
    assert named == {path.name for path in DOCS.glob("*.md")} | {*PAGES.values(), "thresholds.md"}


def _entries(value: object) -> list[str]:
    return [value] if isinstance(value, str) else [one for part in value for one in part.values()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_threshold_is_on_its_page(cls: type) -> None:
    """Each field has a row with its default and a meaning of several words."""
    text, meaning = page(), described(cls)
    for field in fields(cls):
        assert len(meaning[field.name].split()) > 2, f"{cls.__name__}.{field.name}"
        if not is_dataclass(getattr(cls(), field.name)):
            row = rf"\(`{cls.__name__}`\)(?:(?!\n##)[\s\S])*?\n\| `{field.name}` \| `[^|]+` \| \S+"
            assert re.search(row, text), f"{cls.__name__}.{field.name}"


def test_every_public_name_is_in_the_reference() -> None:
    """The page of the Python interface names each name once."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"lightning_nanguard\.(\w+)(?=\s|`)", text)
    assert sorted(named) == sorted(lightning_nanguard.__all__)


def classes_of(*bases: type) -> set[str]:
    """Public classes of the package that are made from one of these."""
    public = [getattr(lightning_nanguard, name) for name in lightning_nanguard.__all__]
    return {one.__name__ for one in public if isinstance(one, type) and issubclass(one, bases) and one not in bases}


def test_every_detector_is_described() -> None:
    """How it shows, what the guard does and how to fix it for good stand in the section of each detector."""
    known = classes_of(lightning_nanguard.Detector)
    found = sections("detectors.md")
    assert known == {"NonFinite", "GradientSpike", "DivergingLoss"}
    for name in known:
        assert name in found, f"no section of docs/detectors.md: {name}"
        assert all(f"**{part}.**" in found[name] for part in PARTS), name


def test_every_remedy_is_described() -> None:
    """Each remedy that a user can list has a section with its arguments."""
    found = sections("remedies.md")
    known = classes_of(lightning_nanguard.Remedy)
    # Averages are restored in any case, so nobody lists their remedy.
    assert {type(one).__name__ for one in executors(()).values()} - {"AverageRollback", "ScaleRollback"} <= known
    for name in known:
        assert name in found, f"no section of docs/remedies.md: {name}"
        arguments = set(inspect.signature(getattr(lightning_nanguard, name)).parameters) - {"thresholds"}
        assert arguments <= set(re.findall(r"^\| `(\w+)` \|", found[name], re.MULTILINE)), name


def test_every_sink_is_described() -> None:
    """Each sink is on the page, whether it is always on or listed by the user."""
    text = (DOCS / "sinks.md").read_text(encoding="utf-8")
    own = {
        node.name
        for node in nodes()
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id == "Sink" for base in node.bases)
    }
    assert classes_of(Sink) <= own
    wrappers = {"BackgroundSink", "CallableSink", "IsolatedSink", "SinkDispatcher"}
    for name in own - wrappers:
        assert re.search(rf"^(## |\| ){name}\b", text, re.MULTILINE), name


def test_every_command_is_described() -> None:
    """Each command has a section with all its options, and no other option."""
    found = {heading.split()[1]: text for heading, text in sections("cli.md").items() if heading.startswith("nanguard")}
    assert found.keys() == {command.NAME for command in COMMANDS}
    for command in COMMANDS:
        parser = argparse.ArgumentParser(add_help=False)
        command.add_arguments(parser)
        options = {option for action in parser._actions for option in action.option_strings}
        rows = re.findall(r"^\| (`-[^|]+) \|", found[command.NAME], re.MULTILINE)
        assert options == {option for row in rows for option in re.findall(r"`([^`]+)`", row)}, command.NAME


PARTS = ("How it shows", "What the guard does", "How to fix it for good")


def described_causes() -> dict[str, str]:
    """What the page says about each cause: its section, or its row and the text above the table."""
    found = sections("causes.md", "###")
    for text in sections("causes.md").values():
        head, _, rows = text.partition("\n| cause | how it shows | how to fix it for good |\n")
        row = r"^\| `(\w+)` \| (\S[^|]*) \| (\S[^|]*) \|$"
        for name, shows, fix in re.findall(row, rows, re.MULTILINE):
            found[name] = f"- **{PARTS[0]}.** {shows}\n- {head}\n- **{PARTS[2]}.** {fix}"
    return found


def test_every_cause_is_described() -> None:
    """The page says all three things about each cause that the package can name, and knows no other cause."""
    found = described_causes()
    suspicions = {"exploding_loss", "stuck_loss", "gradient_spike"}
    missing, gone = causes() - suspicions - found.keys(), found.keys() - suspicions - causes()
    assert not missing, f"no section of docs/causes.md: {', '.join(sorted(missing))}"
    assert not gone, f"docs/causes.md, but no cause: {', '.join(sorted(gone))}"
    for name, text in found.items():
        assert all(f"**{part}.**" in " ".join(text.split()) for part in PARTS), name


def test_what_is_done_fits_what_is_blamed() -> None:
    """A cause that blames its batch is skipped, one that blames state or learner is rolled back."""
    words = {"batch": "skip", "learner": "goes back", "state": "certified snapshot"}
    found = described_causes()
    checked = 0
    for node in nodes():
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
            continue
        scope = next((literals(one.value) for one in node.keywords if one.arg == "scope"), set())
        makers = {"finding_at": {"batch"}, "_learner_finding": {"learner"}, "Finding": scope}
        blamed = makers.get(node.func.id, set())
        for cause in literals(node.args[0]) & found.keys() - {"non_finite_from_start"}:
            checked += len(blamed)
            assert all(words[one] in " ".join(found[cause].split()) for one in blamed), cause
    assert checked > 12


def test_links_lead_to_pages_of_the_site() -> None:
    """Links between files of the repository become links between pages, named by their titles; other links stay."""
    text = "[a](../README.md#limits) [glossary.md](glossary.md#ideas) [c](../examples/digits.py)"
    site = "[a](index.md#limits) [Glossary](glossary.md#ideas) [c](source/examples/digits.py.md)"
    assert relink(text, "docs", "start.md") == site
    assert relink("[d](https://x.org) [e](#here)", "docs", "start.md") == "[d](https://x.org) [e](#here)"
    assert relink("![p](docs/rescued.png)", "", "index.md") == "![p](rescued.png)"
    assert targets("[c](../examples/digits.py) [n](nowhere.md)", "docs") == {"examples/digits.py"}
    assert site_path("examples/plugin") == "source/examples/plugin/index.md"


def test_sources_of_a_folder() -> None:
    """A folder becomes a page that lists its files, and each file a page."""
    made = sources("examples/plugin")
    assert "nanguard_extras/tally.py.md" in made["source/examples/plugin/index.md"]
    assert "class Tally(Sink)" in made["source/examples/plugin/nanguard_extras/tally.py.md"]


def test_a_notebook_becomes_a_page() -> None:
    """Texts stay, and code cells become blocks of code."""
    cells = [{"cell_type": "markdown", "source": ["# Title"]}, {"cell_type": "code", "source": ["a = 1\n", "a"]}]
    assert notebook({"cells": cells}) == "# Title\n\n```python\na = 1\na\n```\n"


def test_lists_are_indented_as_the_site_demands() -> None:
    """What belongs to an item is indented by four spaces for each level, code included."""
    text = "1. one\n\n   ```python\n   if a:\n       b\n   - c\n   ```\n\n   1. two\n      more\n- three\n  more\nend\n"
    assert indent_lists(text) == (
        "1. one\n\n    ```python\n    if a:\n        b\n    - c\n    ```\n\n"
        "    1. two\n        more\n- three\n    more\nend\n"
    )


@pytest.mark.parametrize(
    ("text", "suffix", "found"),
    [
        ('<script src="https://a.org/x.js"></script>', ".html", ["https://a.org/x.js"]),
        ('<link rel="stylesheet" href="//a.org/x.css"><img src="x.png">', ".html", ["//a.org/x.css"]),
        ('<a href="https://a.org">a</a><link rel="canonical" href="https://a.org">', ".html", []),
        ("@import url(https://a.org/f.css); a{background:url(x.png)}", ".css", ["https://a.org/f.css"]),
    ],
)
def test_what_is_loaded_from_elsewhere_is_found(text: str, suffix: str, found: list[str]) -> None:
    """A script, a style sheet or an image on another host is reported, and a link to follow is not."""
    assert loads(text, suffix) == found


def test_the_start_shows_the_quickstart() -> None:
    """The program on the page is the example."""
    program = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8").partition('"""\n\n')[2]
    assert f"```python\n{program}```" in (DOCS / "start.md").read_text(encoding="utf-8")
