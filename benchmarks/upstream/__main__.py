"""Runs a folder of Lightning's own tests twice and prints which fail with the guard only.

`make upstream SOURCES=/path/to/pytorch-lightning TESTS=tests/tests_pytorch/trainer`, or

    python -m benchmarks.upstream /path/to/pytorch-lightning tests/tests_pytorch/trainer

SOURCES is a checkout of Lightning's repository at the tag of the installed version.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

from benchmarks.upstream.plugin import MAKE, VARIABLE

ROOT = Path(__file__).parents[2]


def outcomes(report: Path) -> dict[str, str]:
    """What became of each test, by its name: ``passed``, ``failed`` or ``skipped``."""
    found = {}
    for case in ET.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
    return found


def run(kind: str, sources: Path, tests: list[str], timeout: int, out: Path) -> dict[str, str]:
    """Run tests with one kind of callback in every Trainer; the output of pytest goes into a file beside the report."""
    report, log = out / f"{kind}.xml", out / f"{kind}.log"
    paths = os.pathsep.join([str(sources / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.upstream.plugin"]
    command += [
        "-c",
        str(sources / "pyproject.toml"),
        "--rootdir",
        str(sources),
        "--color=no",
        "--timeout",
        str(timeout),
    ]
    command += ["--continue-on-collection-errors", f"--junitxml={report}", *(str(sources / one) for one in tests)]
    environment = {**os.environ, "PYTHONPATH": paths, VARIABLE: kind}
    with log.open("w") as file:
        # Their tests read files by paths relative to this folder.
        done = subprocess.run(command, cwd=sources / "tests", env=environment, stdout=file, stderr=subprocess.STDOUT)
    if not report.exists():
        sys.exit(f"pytest ended with {done.returncode} and no report; its output is in {log}.")
    return outcomes(report)


def counted(found: dict[str, str]) -> str:
    """How many tests ended in which way."""
    values = list(found.values())
    return ", ".join(f"{values.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.upstream", description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, help="checkout of Lightning's repository")
    parser.add_argument("tests", nargs="+", help="folders or files in it, such as tests/tests_pytorch/trainer")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for one test (default: 120)")
    parser.add_argument("--output", type=Path, help="folder of reports and logs (default: a new one)")
    arguments = parser.parse_args()
    missing = [one for one in arguments.tests if not (arguments.sources / one.split("::")[0]).exists()]
    if missing:
        parser.error(f"{', '.join(missing)}: not in {arguments.sources}, which is to be a checkout of Lightning")
    out = arguments.output or Path(tempfile.mkdtemp(prefix="upstream-"))
    out.mkdir(parents=True, exist_ok=True)
    sources, out = arguments.sources.resolve(), out.resolve()
    found = {kind: run(kind, sources, arguments.tests, arguments.timeout, out) for kind in MAKE}
    for kind, each in found.items():
        print(f"{kind}: {counted(each)}")
    only = sorted(name for name, end in found["guard"].items() if end == "failed" != found["empty"].get(name))
    for name in only:
        print(f"fails with the guard only: {name}")
    print(f"{len(only)} of {len(found['guard'])} fail with the guard only; reports and logs are in {out}")
    return 1 if only else 0


if __name__ == "__main__":
    sys.exit(main())
