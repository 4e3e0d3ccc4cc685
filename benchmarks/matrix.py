"""Which versions the tests pass with: ``python -m benchmarks.matrix ROW…``, an environment for each row.

A row says which Python, torch, Lightning and NumPy: the oldest that are supported and install, the newest, and a
mixture. A row whose Python is not there, or whose packages cannot be installed, is said to be left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "matrix.json"
CACHE = Path("~/.cache/lightning-nanguard/matrix").expanduser()
PACKAGES = ("torch", "pytorch-lightning", "lightning", "torchmetrics", "numpy")
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "safetensors", "psutil", "jsonargparse[signatures]", "rich")
TESTS = (
    "tests/test_compatibility.py",
    "tests/checkpoints",
    "tests/scenarios/test_skips.py",
    "tests/scenarios/test_resuming.py",
)


@dataclass(frozen=True)
class Row:
    """One combination of versions.

    Attributes:
        python: Version of Python.
        torch: What pip is asked for first; where ``TORCH_INDEX`` is set it is taken from there.
        packages: What pip is asked for then, beside the package itself and the tools of its tests.
    """

    python: str
    torch: str
    packages: tuple[str, ...]


_OLD = ("torchmetrics==1.0.*", "numpy==1.26.*")
ROWS = {
    "oldest": Row("3.10", "torch==2.4.*", ("pytorch-lightning==2.4.0", *_OLD)),
    "oldest-lightning": Row("3.10", "torch==2.4.*", ("lightning==2.4.0", *_OLD)),
    "old-beside-new-torch": Row("3.11", "torch", ("pytorch-lightning==2.4.0", *_OLD)),
    "newest": Row("3.13", "torch", ("pytorch-lightning", "numpy")),
    "newest-lightning": Row("3.13", "torch", ("lightning", "numpy")),
}


@dataclass
class Result:
    """What came of a row.

    Attributes:
        row: Its name.
        date: When it was run.
        python: Version of Python.
        versions: What was installed.
        outcome: The last line of pytest, or why it was left out.
        passed: Whether all tests passed; ``None`` where it was left out.
    """

    row: str
    date: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    outcome: str = ""
    passed: bool | None = None


def interpreter(version: str) -> str | None:
    """The interpreter of that version of Python, ``None`` where there is none."""
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    # A shim of pyenv may be on the path for versions that it would not run.
    return str(pyenv[-1]) if pyenv else shutil.which(f"python{version}")


def run_row(name: str, row: Row, python: str, torch: str, tests: Sequence[str], *, keep: bool = False) -> Result:
    """Build the environment of a row and run the tests in it.

    Args:
        name: Name of the row.
        row: The row.
        python: Version of Python.
        torch: What pip is asked for first.
        tests: Arguments of pytest.
        keep: Whether to take the environment that an earlier run has left.
    """
    result = Result(name, time.strftime("%Y-%m-%d"), python)
    made, found = CACHE / name, interpreter(python)
    if found is None:
        result.outcome = f"left out: there is no Python {python}"
        return result
    inside = str(made / "bin" / "python")
    if not (keep and made.exists()):
        result.outcome = _install(found, made, inside, row, torch)
        if result.outcome:
            return result
    result.versions = versions(inside)
    # Older and newer versions of others warn of things of their own.
    command = [inside, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--no-header", *tests]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = done.stdout.strip().splitlines()
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR"))), flush=True)
    result.outcome = re.sub(r"[=\s]*\b(in [\d.]+s.*)$", "", lines[-1]).strip("= ") if lines else done.stderr[-200:]
    result.passed = done.returncode == 0
    return result


def _install(python: str, made: Path, inside: str, row: Row, torch: str) -> str:
    if made.exists():
        shutil.rmtree(made)
    subprocess.run([python, "-m", "venv", str(made)], check=True)
    pip = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    for asked in ([torch, *index], [torch, *row.packages, *TOOLS], ["--no-deps", "-e", str(ROOT)]):
        done = subprocess.run([*pip, *asked], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"left out: {done.stderr.strip().splitlines()[-1][:200]}"
    return ""


def versions(python: str) -> dict[str, str]:
    """What is installed beside an interpreter, of the packages of the matrix."""
    code = (
        "import importlib.metadata as m, json\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{name: names[name] for name in {PACKAGES!r} if name in names}}))"
    )
    return dict(json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout))


def table(results: Sequence[Result]) -> str:
    """A row of Markdown for each."""
    lines = ["| row | date | Python | versions | tests |", "|---|---|---|---|---|"]
    for one in results:
        found = ", ".join(f"{name} {version}" for name, version in one.versions.items()) or "–"
        lines.append(f"| {one.row} | {one.date} | {one.python} | {found} | {one.outcome} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rows and keep what came of them; gives 1 where a test failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matrix", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--python", help="version of Python in the place of the rows' own")
    parser.add_argument("--torch", help="what pip is asked for in the place of the rows' own, such as torch==2.13.0")
    parser.add_argument("--keep", action="store_true", help="take the environments that an earlier run has left")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="arguments of pytest")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where results are kept, as JSON")
    given = parser.parse_args(arguments)
    unknown = set(given.rows) - set(ROWS)
    if unknown:
        parser.error(f"no row is named {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    kept: list[dict[str, object]] = json.loads(given.output.read_text()) if given.output.exists() else []
    failed = False
    for name in given.rows or ROWS:
        row = ROWS[name]
        result = run_row(name, row, given.python or row.python, given.torch or row.torch, given.tests, keep=given.keep)
        print(table([result]).splitlines()[-1], flush=True)
        failed = failed or result.passed is False
        kept = [one for one in kept if one["row"] != name] + [asdict(result)]
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(kept, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
