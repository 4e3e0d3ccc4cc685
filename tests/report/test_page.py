"""The page of a run can be read anywhere, and nothing in a record can do harm there."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import nan
from pathlib import Path
from threading import Thread

import pytest

from lightning_nanguard import Advice, Finding, Intervention
from lightning_nanguard.record.curve import CurvePoint
from lightning_nanguard.record.run_log import RunLog
from lightning_nanguard.report.data import RunData, read_run_data
from lightning_nanguard.report.page import page, verdict
from tests.report.runs import HOSTILE, write_run

pytest.importorskip("matplotlib")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ADVICE = Advice(0, 0, "preflight", Finding("dead_relu", 0.9))
RISING = [CurvePoint(step, 1, 0, float(step), None, None, None, None, None) for step in range(1, 31)]
LOSSES = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0, nan)
SKIPPED = [CurvePoint(at, 1, 0, loss, None, None, None, None, None) for at, loss in enumerate(LOSSES, start=1)]
SKIP = Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)
BACK = replace(SKIP, remedies=("restore", "scale"))
SUSPECTED = replace(ADVICE, occasion="a finite suspicion")


def test_what_the_page_tells(tmp_path: Path) -> None:
    """It has the verdict, the numbers, the figure, and each intervention with its cause, cost, samples and norms."""
    text = page(read_run_data(write_run(tmp_path)))
    for words in (
        "Saved: 2 interventions.",
        "<b>1</b>rollback<",
        "<b>20</b>updates undone by rollbacks",
        "<b>0.05</b>learning rate at the end",
        "<svg role=",
        "the loss is nan",
        "went back to step 40 (20 updates undone)",
        "<dt>cost</dt><dd>20 updates undone; loss 0.5",
        "<dt>in the batch</dt><dd>samples 5, 7</dd>",
        "<dt>to do</dt><dd>Clean the data.</dd>",
        "<td>net.0</td><td>0.5</td><td>nan</td>",
        "<h2>Advice</h2>",
    ):
        assert words in text
    assert '"width=device-width' in text
    assert "prefers-color-scheme: dark" in text


def test_nothing_is_loaded_and_hostile_names_are_text(tmp_path: Path) -> None:
    """The page names no address to load from, and a name with markup and control characters is only shown."""
    text = page(read_run_data(write_run(tmp_path, HOSTILE)))
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    assert "<img" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not re.findall(r'(?:href|src)\s*=\s*"(?!#)', text)
    assert not re.findall(r"url\((?!#)|@import", text)
    assert text.count("</svg>") == 1


@pytest.mark.parametrize(
    ("data", "said", "good"),
    [
        ({}, "Healthy", True),
        ({"advice": [ADVICE]}, "Nothing done: there is advice about dead relu.", None),
        ({"interventions": [SKIP]}, "Saved: 1 intervention", True),
        ({"interventions": [SKIP], "curve": SKIPPED}, "Saved: 1 intervention", True),
        ({"interventions": [replace(SKIP, remedies=("scale",))], "curve": SKIPPED}, "In trouble", False),
        ({"interventions": [SKIP], "curve": RISING}, "Ended: 1 intervention, and the loss is higher at the end", None),
        (
            {"interventions": [SKIP], "advice": [SUSPECTED]},
            "Ended: 1 intervention, and there is advice about dead relu.",
            None,
        ),
        ({"interventions": [BACK], "advice": [SUSPECTED]}, "Saved: 1 intervention.", True),
        ({"interventions": [BACK], "advice": [replace(SUSPECTED, global_step=7)]}, "Ended: 1 intervention, and", None),
        (
            {"interventions": [replace(BACK, remedies=("restore", "redo"))], "advice": [SUSPECTED]},
            "Ended: 1 intervention, and",
            None,
        ),
        ({"interventions": [SKIP], "alive": True}, "Kept alive so far", True),
        ({"interventions": [replace(SKIP, applied=False)]}, "Only observed: 1 fault, and nothing was changed.", True),
        (
            {"interventions": [replace(SKIP, remedies=("stop",))]},
            "Lost: the guard stopped the run after 1 intervention; there was no certified snapshot.",
            False,
        ),
        (
            {"interventions": [replace(SKIP, remedies=("stop",), snapshot_step=4)]},
            "Lost: the guard stopped the run after 1 intervention; the module has the weights of step 4.",
            False,
        ),
        ({"log": RunLog(Path(), "killed", ({},))}, "Killed", False),
        ({"curve": [CurvePoint(1, 1, 0, float("nan"), None, None, None, None, None)]}, "In trouble", False),
    ],
)
def test_verdict(data: dict[str, object], said: str, good: bool | None) -> None:
    """The first sentence tells a saved run from one that is lost, was killed, only observed, or healthy."""
    sentence, is_good = verdict(RunData(Path(), **data))  # type: ignore[arg-type]
    assert sentence.startswith(said)
    assert is_good == good


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    """A million updates and thousands of interventions make a page of less than a megabyte, which tells each kind."""
    points = [CurvePoint(step * 128, 128, 0, 1.0, 2.0, 1.0, 2.0, 0.1, None) for step in range(1, 7900)]
    many = [replace(SKIP, global_step=step * 200) for step in range(5000)]
    rare = replace(SKIP, global_step=999_999, fault="rare_kind")
    text = page(RunData(tmp_path, curve=points, interventions=[*many, rare]))
    assert len(text) < 1_000_000
    assert "60 of 5,001 are shown here" in text
    assert "rare kind" in text
    assert text.count("<details") == 60


@contextmanager
def asked_for() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: its address, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            """Nothing on the console."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", paths
        finally:
            server.shutdown()
            thread.join()


def rendered(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What Chromium makes of a page: its document on standard output, its console on standard error."""
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr", "--v=0", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser(tmp_path: Path) -> None:
    """Chromium renders it with an empty console, loads nothing, and runs no script of a hostile name."""
    with asked_for() as (address, paths):
        name = HOSTILE.replace("http://127.0.0.1:9", address)
        done = rendered(page(read_run_data(write_run(tmp_path / "run", name))), tmp_path)
        assert paths == []
        rendered(f"<img src={address}/x>", tmp_path)
        assert paths == ["/x"]  # so it would have been seen
    assert "CONSOLE" not in done.stderr
    assert "<title>NaNGuard: 20261128-220000-abcdef</title>" in done.stdout
    assert "Saved: 2 interventions." in done.stdout
    assert done.stdout.count("<path") > 10
    assert "<script" not in done.stdout
