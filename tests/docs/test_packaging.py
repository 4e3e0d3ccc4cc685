"""What a package index, a citation and a public CI are given is complete and agrees with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_nanguard
from setup import for_index, repository
from tests.installed import import_time

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
RELEASING = (ROOT / "RELEASING.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_the_versions_agree() -> None:
    """Package, project and citation name one version."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert f'\nversion = "{lightning_nanguard.__version__}"\n' in PYPROJECT
    assert cited["version"] == lightning_nanguard.__version__
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_links_of_the_readme_on_an_index_with_an_address() -> None:
    """Every link is absolute and leads to a file at the tag of the version; pictures are raw files."""
    shown = for_index(README, "https://example.org/team/project", "1.2.3")
    links = [link for link in LINK.findall(shown) if not link.startswith("#")]
    assert len(links) > 15
    for link in links:
        inside = re.fullmatch(r"https://example\.org/team/project/(blob|raw)/v1\.2\.3/([^#]+)(#.*)?", link)
        assert inside, link
        assert (ROOT / inside[2]).exists(), link
        assert (inside[1] == "raw") == inside[2].endswith(".png")


def test_links_of_the_readme_on_an_index_without_an_address() -> None:
    """No link leads nowhere: words stay, relative links and pictures go, and links within the page stay."""
    shown = for_index(README, None, "1.2.3")
    assert all(link.startswith(("#", "https://")) for link in LINK.findall(shown))
    assert "docs/rescue.md lists every group of runs" in shown
    assert "](#how-far-you-trust-it)" in shown
    assert "![" not in shown


def test_the_address_of_the_repository() -> None:
    """It is read from project.urls, and there is none while it is not known."""
    assert repository('[project.urls]\nRepository = "https://example.org/a/b/"\n') == "https://example.org/a/b"
    assert repository('# Repository = "https://…"\n') is None


def test_anchors_of_the_readme() -> None:
    """Each link within the page leads to a heading."""
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert {link[1:] for link in LINK.findall(README) if link.startswith("#")} <= anchors


def test_the_import_is_light() -> None:
    """The package is imported without torch and without Lightning, which the measured process asserts."""
    assert import_time() > 0.0


def test_versions_of_python_are_said_as_tried() -> None:
    """The classifiers name the versions that RELEASING.md says the tests were run with, and no other."""
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    tried = re.search(r"^\| Python \| ([\d., ]+) \(all tests\)", RELEASING, re.MULTILINE)
    assert tried
    assert named == tried[1].split(", ")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named


def test_the_workflow_runs_what_exists() -> None:
    """Each make target and script of the public workflow is there, and the oldest Python is among its versions."""
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {one for command in commands if command.startswith("make ") for one in command.split()[1:]} <= targets
    assert all((ROOT / command).exists() for command in commands if command.startswith(".ci/"))
    oldest = re.search(r'requires-python = ">=(3\.\d+)"', PYPROJECT)
    assert oldest
    assert jobs["newest"]["strategy"]["matrix"]["python"][0] == oldest[1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_templates(path: Path) -> None:
    """Each template has what the form needs: a name, a description, and fields with labels and ids of their own."""
    template = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert template == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= template.keys()
    assert all(field["attributes"]["label"] for field in template["body"])
    ids = [field["id"] for field in template["body"]]
    assert len(ids) == len(set(ids))


def test_the_package_holds_the_readme_of_the_index() -> None:
    """The metadata made from this checkout hold the README with links for the index."""
    code = (
        "import os, sys; os.chdir(sys.argv[1]); sys.argv = ['setup.py', '--quiet', '--long-description']; "
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__name__': '__main__', '__file__': 'setup.py'})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(ROOT)], capture_output=True, text=True, check=True
    )
    version = lightning_nanguard.__version__
    assert done.stdout.strip() == for_index(README, repository(PYPROJECT), version).strip()
