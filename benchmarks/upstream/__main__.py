"""Runs folders of Lightning's own tests and prints which fail with the guard only.

`make upstream SOURCES=/path/to/pytorch-lightning TESTS=tests/tests_pytorch/trainer`, or

    python -m benchmarks.upstream /path/to/pytorch-lightning tests/tests_pytorch/trainer

SOURCES is a checkout of Lightning's repository at the tag of the installed version. A folder is run with the guard in
every Trainer. What fails is run again, with the guard and with an empty callback in its place: a test that fails twice
with the guard and passes with the empty callback fails because of the guard.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from benchmarks.upstream.by_design import reason
from benchmarks.upstream.plugin import VARIABLE

ROOT = Path(__file__).parents[2]


def outcomes(report: Path) -> dict[str, str]:
    """What became of each test, by its name: ``passed``, ``failed`` or ``skipped``."""
    found = {}
    for case in ET.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
    return found


def node(sources: Path, name: str) -> str:
    """How pytest is given a test of a report."""
    dotted, _, test = name.partition("::")
    parts = (dotted or test).split(".")  # a file that cannot be collected has a name alone
    lengths = range(len(parts), 0, -1)
    length = next(n for n in lengths if (sources / Path(*parts[:n]).with_suffix(".py")).exists())
    return "::".join([str(Path(*parts[:length]).with_suffix(".py")), *parts[length:], *([test] if dotted else [])])


def run(kind: str, sources: Path, tests: list[str], timeout: int, out: Path, name: str | None = None) -> dict[str, str]:
    """Run tests with one kind of callback in every Trainer; the output of pytest goes into a file beside the report."""
    report, log = out / f"{name or kind}.xml", out / f"{name or kind}.log"
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


def verdicts(found: dict[str, str], again: dict[str, str], empty: dict[str, str]) -> dict[str, Any]:
    """Which failures are the guard's.

    Args:
        found: What became of each test with the guard.
        again: The same of those that failed, when they were run again.
        empty: The same of those, with an empty callback.
    """
    failed = sorted(name for name, end in found.items() if end == "failed")
    ours = [name for name in failed if again.get(name) == "failed" and empty.get(name) == "passed"]
    values = list(found.values())
    return {
        "tests": len(found),
        **{kind: values.count(kind) for kind in ("passed", "failed", "skipped")},
        "passed again": [name for name in failed if again.get(name) == "passed"],
        "fail with an empty callback": [name for name in failed if empty.get(name) != "passed"],
        "by design": {name: why for name in ours if (why := reason(name)) is not None},
        "fail with the guard only": [name for name in ours if reason(name) is None],
    }


def measured(sources: Path, folder: str, timeout: int, out: Path, *, resume: bool) -> dict[str, Any]:
    """What became of the tests of one folder.

    Args:
        sources: Checkout of Lightning's repository.
        folder: A folder or file in it.
        timeout: Seconds for one test.
        out: Where reports and logs go.
        resume: Whether a report of the first run that lies there is taken as it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    first = out / "guard.xml"
    found = outcomes(first) if resume and first.exists() else run("guard", sources, [folder], timeout, out)
    failed = [name for name, end in found.items() if end == "failed"]
    nodes = [node(sources, name) for name in failed]
    again = run("guard", sources, nodes, timeout, out, "guard-again") if nodes else {}
    empty = run("empty", sources, nodes, timeout, out) if nodes else {}
    return verdicts(found, again, empty)


def versions(sources: Path) -> dict[str, str]:
    """What was measured: the versions of the tests and of what is installed, and the day."""
    names = ("lightning", "pytorch-lightning", "torch")
    return {
        "tests": (sources / "src" / "version.info").read_text().strip(),
        **{name: importlib.metadata.version(name) for name in names},
        "python": sys.version.split()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.upstream", description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, help="checkout of Lightning's repository")
    parser.add_argument("tests", nargs="+", help="folders or files in it, such as tests/tests_pytorch/trainer")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one test (default: 300)")
    parser.add_argument("--reports", type=Path, help="folder of reports and logs (default: a new one)")
    parser.add_argument("--resume", action="store_true", help="take the first run's reports that lie in --reports")
    parser.add_argument("--output", type=Path, help="file of results, in which those of other folders are kept")
    arguments = parser.parse_args()
    missing = [one for one in arguments.tests if not (arguments.sources / one.split("::")[0]).exists()]
    if missing:
        parser.error(f"{', '.join(missing)}: not in {arguments.sources}, which is to be a checkout of Lightning")
    out = (arguments.reports or Path(tempfile.mkdtemp(prefix="upstream-"))).resolve()
    sources, conflicts = arguments.sources.resolve(), 0
    for folder in arguments.tests:
        result = measured(sources, folder, arguments.timeout, out / Path(folder).name, resume=arguments.resume)
        print(json.dumps({folder: result}, indent=2), flush=True)
        conflicts += len(result["fail with the guard only"])
        if arguments.output is not None:
            kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
            kept[folder] = {"date": str(dt.date.today()), "versions": versions(sources), **result}
            arguments.output.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
    print(f"{conflicts} fail with the guard only and not by design; reports and logs are in {out}")
    return 1 if conflicts else 0


if __name__ == "__main__":
    sys.exit(main())
