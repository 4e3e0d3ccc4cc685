"""What the documents say is run."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

import lightning_nanguard
from lightning_nanguard import NaNGuard
from lightning_nanguard.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
EVERY = [*PAGES, *(ROOT / name for name in ("CHANGELOG.md", "RELEASING.md", "SECURITY.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced block of a language, with the name of its page."""
    pattern = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [(page.name, code) for page in PAGES for code in pattern.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "code"), [one for one in blocks("python") if one[0] != "faq.md"])
def test_python_snippets_run(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every Python snippet runs as it stands, and prints what it says behind ``# →``."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of training batches")
        exec(compile(textwrap.dedent(code), page, "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    if promised := re.findall(r"# → (.*)$", code, re.MULTILINE):
        assert printed == promised


@pytest.mark.parametrize(("page", "code"), blocks("yaml"))
def test_yaml_snippets_name_what_exists(page: str, code: str) -> None:
    """Every class path in a YAML snippet can be made with the arguments beside it."""

    def build(node: object) -> object:
        if isinstance(node, list):
            return [build(item) for item in node]
        if isinstance(node, dict) and "_target_" in node:
            name = node.pop("_target_").removeprefix("lightning_nanguard.")
            return getattr(lightning_nanguard, name)(**{key: build(value) for key, value in node.items()})
        if isinstance(node, dict) and "class_path" in node:
            name = node["class_path"].removeprefix("lightning_nanguard.")
            arguments = {key: build(value) for key, value in node.get("init_args", {}).items()}
            return getattr(lightning_nanguard, name)(**arguments)
        return node

    settings = yaml.safe_load(code)
    callbacks = settings["trainer"]["callbacks"] if "trainer" in settings else [*settings["callbacks"].values()]
    (guard,) = build(callbacks)  # type: ignore[misc]
    assert isinstance(guard, NaNGuard)


def test_commands_in_the_documents_exist() -> None:
    """Every make target the documents name is in the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    command = re.compile(r"(?:^ *|`)make ([a-z-]+)\b", re.MULTILINE)
    named = {target for page in PAGES for target in command.findall(page.read_text(encoding="utf-8"))}
    assert {"demo", "test", "rescue", "bench"} <= named <= targets


def test_modules_named_in_commands_exist() -> None:
    """Every module that a document runs with ``python -m`` can be run so."""
    named = {
        module for page in EVERY for module in re.findall(r"python -m ([\w.]+)", page.read_text(encoding="utf-8"))
    } - {"pytest", "twine"}
    assert "benchmarks.rescue" in named
    for module in named:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_nanguard_commands_in_the_documents_exist() -> None:
    """Every subcommand of ``nanguard`` that a document names is there, with the options named beside it."""
    line = re.compile(r"(?:^|`)nanguard ([a-z][a-z-]*)((?: [^`\n#]*)?)", re.MULTILINE)
    named = {
        (command, option)
        for page in EVERY
        for command, rest in line.findall(page.read_text(encoding="utf-8"))
        for option in ["", *re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", rest)]
    }
    texts = {command.NAME: help_of(command) for command in COMMANDS}
    assert set(texts) == {command for command, _ in named}
    for command, option in named:
        assert option in texts[command], f"nanguard {command} {option}"


def help_of(command: Any) -> str:
    """What a subcommand says about its options."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.format_help()


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    """Every relative link of a document points at a file, and at a heading that this has."""
    for page in EVERY:
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}#{anchor}"


def test_files_named_in_the_architecture_exist() -> None:
    """Every module that a page about the inside names is there."""
    for page in ("architecture", "trials", "repeats"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        for name in set(re.findall(r"`([a-z_/]+\.py)`", text)):
            assert (ROOT / "lightning_nanguard" / name).exists(), f"{page}.md: {name}"


def test_tests_named_in_the_documents_exist() -> None:
    """Every test that a document names as its proof is there, with the case it names."""
    named = {
        (file, name, case)
        for page in PAGES
        for file, name, case in re.findall(
            r"`(tests/[\w/]+\.py)(?:::(\w+)(?:\[([^`]+)\])?)?`", page.read_text(encoding="utf-8")
        )
    }
    assert len(named) > 40
    for file, name, case in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source, f"{file}::{name}"
        assert not case or f'"{case}"' in source, f"{file}::{name}[{case}]"


def test_names_of_tests_in_the_documents_exist() -> None:
    """A test that a document names without its file is there, too."""
    files = (ROOT / "tests").rglob("test_*.py")
    there = {name for path in files for name in re.findall(r"def (test_\w+)\(", path.read_text(encoding="utf-8"))}
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    upstream = {"test_hpc_restore_attempt"}  # of Lightning's own tests
    assert len(named) > 40
    assert not (missing := sorted(named - there - upstream)), ", ".join(missing)


def test_every_public_name_is_there() -> None:
    """What the package says it has can be had, and nothing else."""
    for name in lightning_nanguard.__all__:
        assert getattr(lightning_nanguard, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchThing'"):
        lightning_nanguard.NoSuchThing  # noqa: B018


def test_the_command_is_installed() -> None:
    """The console script answers."""
    program = Path(sys.executable).with_name("nanguard")
    assert subprocess.run([program, "--help"], capture_output=True, timeout=60, check=True).returncode == 0
