"""Forks runs from one process that has imported everything, and kills them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .life import PHASES, Shared, examine, live

_AIMED = ("step", "snapshot", "save", "last good", "record")
_LIVES = 2
_LAST = 12
_TOTALS = (
    "runs that went on to their end",
    "runs that went on from a checkpoint",
    "files examined",
    "torn files of ModelCheckpoint",
    "records read",
)
_LONGEST = 60.0


Show = Callable[[int], None]


class Campaign:
    """Kills runs and looks at what they leave.

    Each run is killed twice, then goes on to an end of its own. A third of the kills come at a random time, the others
    at a random time into the next step, snapshot, save, replacement of the last good file, or record.

    Args:
        seed: Of the moments.
        elsewhere: A folder on another file system: every second run has its temporary files there.
    """

    def __init__(self, seed: int, elsewhere: Path | None) -> None:
        self._draw = random.Random(seed)
        self._elsewhere = elsewhere
        self._runs = self._kills = 0
        self._phases: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._wrong: list[str] = []

    def run(self, kills: int, show: Show = lambda done: None) -> dict[str, Any]:
        """Kill so many times.

        Args:
            kills: How many.
            show: Told after every kill how many there were.

        Returns:
            Plain numbers, and in words whatever should not be.
        """
        while self._kills < kills:
            self._runs += 1
            folder = Path(tempfile.mkdtemp(prefix="nanguard-kills-"))
            other = self._elsewhere / folder.name if self._elsewhere is not None and self._runs % 2 else None
            try:
                self._one(folder, other, min(_LIVES, kills - self._kills), show)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                if other is not None:
                    shutil.rmtree(other, ignore_errors=True)
        return {
            "kills": self._kills,
            "runs": self._runs,
            "killed in": dict(sorted(self._phases.items())),
            **{key: self._totals[key] for key in _TOTALS},
            "wrong": self._wrong,
        }

    def _one(self, folder: Path, other: Path | None, lives: int, show: Show) -> None:
        shared = Shared()
        for _ in range(lives):
            self._phases[_killed(folder, shared, other, self._draw)] += 1
            self._kills += 1
            show(self._kills)
            self._examine(folder, shared, other, f"run {self._runs} after kill {self._kills}")
        from_last_good = self._draw.random() < 0.5
        end = _child(lambda: live(folder, shared, updates=_LAST, from_last_good=from_last_good, elsewhere=other))
        if "error" in end:
            self._wrong.append(f"run {self._runs} does not go on: {end['error']}")
        elif end["step"] < end["resumed"] + _LAST:
            self._wrong.append(f"run {self._runs} ended at step {end['step']}, gone on from {end['resumed']}")
        else:
            self._totals[_TOTALS[0]] += 1
            self._totals[_TOTALS[1]] += end["resumed"] > 0
        self._examine(folder, shared, other, f"run {self._runs} at its end")

    def _examine(self, folder: Path, shared: Shared, other: Path | None, where: str) -> None:
        seen = _child(lambda: examine(folder, shared, may_be_torn=other is not None))
        if "error" in seen:
            self._wrong.append(f"{where}: {seen['error']}")
            return
        for key, name in zip(_TOTALS[2:], ("files", "torn", "records"), strict=True):
            self._totals[key] += seen[name]
        self._wrong += [f"{where}: {one}" for one in seen["wrong"]]


def _killed(folder: Path, shared: Shared, elsewhere: Path | None, draw: random.Random) -> str:
    """Start a life and kill it; the phase it was in."""
    aim = draw.choice(_AIMED) if draw.random() < 2 / 3 else None
    wait = draw.uniform(0.0, 0.4)
    within = 10 ** draw.uniform(-5, -2.5)
    from_last_good = draw.random() < 0.5
    shared.phase = PHASES.index("setup")
    pid = os.fork()
    if pid == 0:
        _die_with(lambda: live(folder, shared, updates=10**6, from_last_good=from_last_good, elsewhere=elsewhere))
    started = time.monotonic()
    time.sleep(wait)
    if aim is not None:
        wanted = PHASES.index(aim)
        # Whatever it is in now has begun earlier: wait for the next one.
        while shared.phase == wanted and time.monotonic() - started < _LONGEST:
            pass
        while shared.phase != wanted and time.monotonic() - started < _LONGEST and _alive(pid):
            pass
        until = time.perf_counter() + within
        while time.perf_counter() < until:
            pass
    phase = PHASES[shared.phase]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return phase


def _alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _die_with(work: Callable[[], Any]) -> None:
    try:
        work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` gives in a process of its own, bounded in time."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            result = work()
        except BaseException as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(writer, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(int(_LONGEST))
    try:
        with os.fdopen(reader) as pipe:
            text = pipe.read()
    finally:
        signal.alarm(0)
        os.waitpid(pid, 0)
    result: dict[str, Any] = json.loads(text) if text else {"error": f"no answer within {_LONGEST:.0f} s"}
    return result
