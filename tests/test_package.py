"""How the package is laid out: rooms, sizes, the direction of imports, numbers and names in their places."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lightning_nanguard

ROOT = Path(lightning_nanguard.__file__).parent
TESTS = ROOT.parent / "tests"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
MODULES = [name for name in FILES if not name.endswith(("__init__.py", "__main__.py"))]
LIGHTNING = {"pytorch_lightning", "lightning", "lightning_fabric"}
HEAVY = {*LIGHTNING, "torch", "numpy", "torchmetrics"}

# What each room may import of the package, beside itself. Rooms in the first line are pure: no torch, no NumPy.
PURE = ("types", "errors", "thresholds", "detect", "decide", "record")
BASE = {"types", "errors", "thresholds"}
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "thresholds": set(),
    "errors": {"types"},
    "events": {"types"},
    "measure": BASE,
    "detect": BASE,
    "decide": BASE,
    "record": BASE,
    "metrics": BASE | {"measure"},
    "report": BASE | {"record"},
    "act": BASE | {"measure", "detect", "decide", "record", "state"},
    "state": BASE | {"measure", "detect", "decide", "record"},
    "distributed": BASE | {"measure", "state"},
    "checkpoints": BASE | {"measure", "record", "state", "distributed"},
    "diagnosis": BASE | {"measure", "detect", "decide", "record", "state"},
    "guard": BASE
    | {"measure", "detect", "decide", "record", "act", "state", "distributed", "checkpoints", "diagnosis"},
}
ABOVE = {"trainer", "callback", "cli", "__init__", "__main__"}
"""Rooms that may import whatever is below them."""
NO_THRESHOLDS = {
    "distributed/ranks.py: rank",
    "distributed/ranks.py: sharers",
    "distributed/ranks.py: snapshot_parts",
    "distributed/ranks.py: world",
    "detect/base.py: AT_ONCE",  # what Detector.limits() promises
    "guard/readback.py: MAX_DELAY",  # what a Readback promises
    "guard/step_check.py: _OPTIMIZER",  # an index
    "measure/checksum.py: _PRIME",
    "measure/checksum.py: _ROW",
    "state/snapshot_room.py: _MANY",
    "metrics.py: plot_lower_bound",
    "metrics.py: plot_upper_bound",
}
"""Named numbers that decide nothing."""


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def room(name: str) -> str:
    return name.removesuffix(".py").split("/")[0]


def imports(name: str) -> Iterator[str]:
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


# ---------------------------------------------------------------------------------------------------- rooms


def test_every_module_has_a_test_file_of_its_name() -> None:
    """A reader finds the tests of ``room/module.py`` in ``tests/room/test_module.py``."""
    missing = {
        name
        for name in MODULES
        if room(name) not in {"thresholds"} and not (TESTS / name).with_name(f"test_{Path(name).name}").exists()
    }
    assert missing == set()


def test_every_folder_is_a_package() -> None:
    """A folder without ``__init__.py`` would be put on the import path by pytest, where its modules hide others."""
    assert {path.parent for path in ROOT.rglob("*.py") if not (path.parent / "__init__.py").exists()} == set()


def test_the_top_is_small() -> None:
    """At most nine files lie beside the rooms."""
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= 9


def test_no_file_of_the_package_is_kept_from_git() -> None:
    """No pattern for what runs write keeps a room of the package or of its tests out of a clone."""
    if not (ROOT.parent / ".git").exists():
        pytest.skip("this is no clone")
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "lightning_nanguard", "tests"]
    done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, timeout=60, check=True)
    assert [name for name in done.stdout.splitlines() if name.endswith(".py")] == []


# ---------------------------------------------------------------------------------------------------- sizes


def body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def too_large() -> Iterator[str]:
    for name in FILES:
        if len((ROOT / name).read_text(encoding="utf-8").splitlines()) > 450:
            yield name
        for node in ast.walk(tree(name)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and body_lines(node) > 50:
                yield f"{name}::{node.name}"
            if isinstance(node, ast.ClassDef) and node.name != "NaNGuard":
                methods = [part for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))]
                if len(methods) > 32:
                    yield f"{name}::{node.name}"


def test_sizes() -> None:
    """No file has over 450 lines, no function's body over 50, no class over 32 methods but the callback."""
    assert list(too_large()) == []


# ---------------------------------------------------------------------------------------------------- imports


def test_imports_go_one_way() -> None:
    """A room imports only rooms below it."""
    wrong = {
        (name, used)
        for name in FILES
        if room(name) not in ABOVE
        for dotted in imports(name)
        if dotted.startswith("lightning_nanguard.")
        and (used := dotted.split(".")[1]) not in MAY_IMPORT[room(name)] | {room(name)}
    }
    assert wrong == set()
    assert {room(name) for name in FILES} <= {*MAY_IMPORT, *ABOVE}


def test_only_the_device_names_cuda() -> None:
    """Streams, events, pinned memory and room of a device are known in one file, so that a test can give another."""
    naming = {
        name
        for name in FILES
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.cuda", "torch._C._host"))
    }
    assert naming <= {"state/device.py"}
    assert not {name for name in FILES if name != "state/device.py" and "torch.cuda" in set(imports(name))}


def test_only_the_trainers_room_knows_lightning() -> None:
    """No module but ``callback`` and those in ``trainer`` imports Lightning."""
    knowing = {name for name in FILES if {dotted.split(".")[0] for dotted in imports(name)} & LIGHTNING}
    assert {room(name) for name in knowing} <= {"callback", "trainer"}


def test_pure_rooms_load_nothing_heavy() -> None:
    """The pure rooms are importable without torch, Lightning or NumPy being loaded."""
    names = [
        "lightning_nanguard." + re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".")
        for name in FILES
        if room(name) in PURE
    ]
    code = f"import sys, {', '.join(names)}\nheavy = {HEAVY} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    """Every public name is importable from the package itself and listed; another is an AttributeError."""
    for name in lightning_nanguard.__all__:
        assert getattr(lightning_nanguard, name) is not None
        assert name in dir(lightning_nanguard)
    wanted = {
        "NaNGuard", "TrainingDivergedError", "Intervention", "Finding", "Fault", "Reading", "Budget", "Detector",
        "NonFinite", "GradientSpike", "DivergingLoss", "Remedy", "SkipStep", "Rollback", "ReduceLR", "ClipGradients",
        "ResetMoments", "StopTraining",
    }  # fmt: skip
    assert wanted <= set(lightning_nanguard.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'NanGuard'"):
        _ = lightning_nanguard.NanGuard


# ---------------------------------------------------------------------------------------------------- numbers and kinds


def test_no_decision_looks_at_the_kind_of_a_fault() -> None:
    """``kind`` is compared with a word only where words are chosen, so a user's own kind is as good as a built-in."""
    compared = set()
    for name in FILES:
        if name == "record/messages.py" or name.startswith("diagnosis/rules/"):
            continue
        for node in ast.walk(tree(name)):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            looks = any(isinstance(side, ast.Attribute) and side.attr == "kind" for side in sides)
            words = [one for side in sides for one in ast.walk(side) if isinstance(one, ast.Constant)]
            if looks and any(isinstance(one.value, str) for one in words):
                compared.add(f"{name}: {ast.unparse(node)}")
    assert compared == set()


VERSIONS = re.compile(r"_?([A-Z]+_)?SCHEMA(_VERSION)?$")


def is_number(node: ast.expr | None) -> bool:
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def numeric_constants() -> Iterator[str]:
    """Names of numbers at the level of a module or a class, outside of ``thresholds``."""
    for name in FILES:
        if room(name) in {"thresholds"}:
            continue
        scopes = [tree(name), *(node for node in tree(name).body if isinstance(node, ast.ClassDef))]
        for scope in scopes:
            frozen = isinstance(scope, ast.ClassDef) and "dataclass" in ast.dump(ast.Module(scope.decorator_list, []))
            if frozen or (isinstance(scope, ast.ClassDef) and "NamedTuple" in map(ast.unparse, scope.bases)):
                continue  # fields with defaults
            for node in scope.body:
                if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not is_number(node.value):
                    continue
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if not VERSIONS.match(ast.unparse(target)):
                        yield f"{name}: {ast.unparse(target)}"


def test_numbers_that_decide_lie_in_thresholds() -> None:
    """No module outside of ``thresholds`` names a number: tests and ablations set one without patching."""
    assert set(numeric_constants()) <= NO_THRESHOLDS
