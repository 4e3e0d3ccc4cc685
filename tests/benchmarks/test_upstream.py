"""Lightning's own tests with the guard: which failures are the guard's."""

from __future__ import annotations

from pathlib import Path

from benchmarks.upstream.__main__ import node, outcomes, verdicts
from benchmarks.upstream.by_design import reason

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good"/>
<testcase classname="tests.test_a" name="test_bad"><failure/></testcase>
<testcase classname="tests.test_a" name="test_left_out"><skipped/></testcase>
<testcase classname="" name="tests.test_b"><error/></testcase>
</testsuite></testsuites>"""


def test_outcomes(tmp_path: Path) -> None:
    """Failures and errors count as failed; a file that cannot be collected is a test of its own."""
    (tmp_path / "one.xml").write_text(REPORT)
    assert outcomes(tmp_path / "one.xml") == {
        "tests.test_a::test_good": "passed",
        "tests.test_a::test_bad": "failed",
        "tests.test_a::test_left_out": "skipped",
        "::tests.test_b": "failed",
    }


def test_what_is_the_guards() -> None:
    """A failure that comes again, and not with an empty callback, is the guard's, with its reason where it has one."""
    names = ["always", "once", "ours", "a::test_throughput_monitor_x"]
    found = {"good": "passed", "left out": "skipped", **dict.fromkeys(names, "failed")}
    again = {**dict.fromkeys(names, "failed"), "once": "passed"}
    empty = {**dict.fromkeys(names, "passed"), "always": "failed"}
    result = verdicts(found, again, empty)
    assert (result["tests"], result["passed"], result["failed"], result["skipped"]) == (6, 1, 4, 1)
    assert result["passed again"] == ["once"]
    assert result["fail with an empty callback"] == ["always"]
    assert result["fail with the guard only"] == ["ours"]
    assert list(result["by design"]) == ["a::test_throughput_monitor_x"]


def test_names(tmp_path: Path) -> None:
    """pytest is given a test by its file, its class and its name."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").touch()
    assert node(tmp_path, "tests.test_a::test_b[x.y::z]") == "tests/test_a.py::test_b[x.y::z]"
    assert node(tmp_path, "tests.test_a.TestC::test_d") == "tests/test_a.py::TestC::test_d"
    assert node(tmp_path, "::tests.test_a") == "tests/test_a.py"


def test_reasons() -> None:
    """They go by the beginning of the test's own name."""
    assert reason("tests.test_a::test_hpc_restore_attempt") is not None
    assert reason("tests.test_hpc_restore_attempt::test_other") is None
