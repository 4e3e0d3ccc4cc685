"""Whatever the files of a run hold, every command ends with its answer or with one line of error.

``RUNS=1000`` in the environment spoils as many files, ``SEED=3`` others.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_nanguard import NaNGuard
from lightning_nanguard.cli.main import main
from tests.classifier import Model, Numbers
from tests.helpers import FaultAt, trainer_for

Spoil = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, draw: random.Random) -> bytes:
    """Some bytes are others."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 8, 64])):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    """The end is gone."""
    return data[: draw.randrange(len(data))]


def twice(data: bytes, draw: random.Random) -> bytes:
    """A piece from elsewhere is in the middle."""
    at, start = draw.randrange(len(data)), draw.randrange(len(data))
    return data[:at] + data[start : start + draw.randrange(400)] + data[at:]


def numbers(data: bytes, draw: random.Random) -> bytes:
    """A digit is a number out of all proportion, or none."""
    odd = draw.choice([b"1e999", b"-1", b"9" * 5000, b"NaN", b"null", b"true", b'"\\u0000\\u001b[2J"', b"{}", b"[[]]"])
    places = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    place = draw.choice(places or [0])
    return data[:place] + odd + data[place + 1 :]


def deep(data: bytes, draw: random.Random) -> bytes:
    """More brackets than can be parsed."""
    return draw.choice([b"[", b'{"a":']) * 100_000 + b"\n" + data


def other(data: bytes, draw: random.Random) -> bytes:
    """Something else altogether."""
    return draw.choice(
        [b"", b"\x00" * 4096, b"null\n", b"7\n", b"\xff\xfe\x00a\n", b"a,b\n1,2\n", draw.randbytes(3000)]
    )


SPOILS: tuple[Spoil, ...] = (flip, cut, twice, numbers, deep, other)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with interventions, advice, a curve, a good checkpoint and an incident."""
    folder = tmp_path_factory.mktemp("hostile")
    guard = NaNGuard(bundle_dir=folder / "incidents", dirpath=folder, preflight=True, last_good_every_n_steps=5)
    trainer = trainer_for(folder, guard, [FaultAt("input", float("nan"), 9)], max_epochs=10, limit_val_batches=0)
    trainer.fit(Model(middle="dropout"), Numbers())
    return folder


def commands(folder: Path) -> list[list[str]]:
    """Every command that reads the files of a run."""
    incident = str(next((folder / "incidents").iterdir()))
    return [
        ["explain", str(folder)],
        ["samples", str(folder)],
        ["tail", str(folder)],
        ["last-good", str(folder)],
        ["report", str(folder), "-o", str(folder / "report.html")],
        ["replay", incident],
        ["replay", incident, "--module", "tests.classifier:Model"],
    ]


def test_spoilt_files(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Files are spoilt at random; no command raises, takes long, says much, or sends a control character."""
    files = [file.relative_to(run) for file in sorted(run.rglob("*")) if file.is_file()]
    assert {".jsonl", ".csv", ".json", ".safetensors", ".ckpt"} <= {file.suffix for file in files}
    draw = random.Random(int(os.environ.get("SEED", "0")))
    for number in range(int(os.environ.get("RUNS", "40"))):
        folder = tmp_path / str(number)
        shutil.copytree(run, folder)
        file, spoil = draw.choice(files), draw.choice(SPOILS)
        (folder / file).write_bytes(spoil((run / file).read_bytes(), draw))
        story = f"number {number}: {spoil.__name__} of {file}"
        for command in commands(folder):
            begun = time.monotonic()
            status = main(command)
            said = capfd.readouterr()
            assert status in (0, 1, 2), story
            assert time.monotonic() - begun < 60, story
            assert len(said.out) + len(said.err) < 100_000, story
            assert not any(ord(one) < 32 and one not in "\n\t" for one in said.out + said.err), story
            assert "Traceback" not in said.err, story
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "name", ["interventions.jsonl", "curve.csv", "run.jsonl", "bad_samples.jsonl", "nanguard-last-good.ckpt"]
)
def test_what_is_no_file(name: str, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A folder or a pipe in the place of a file is told, and waited for by nobody."""
    for make in (Path.mkdir, os.mkfifo):
        folder = tmp_path / make.__name__
        shutil.copytree(run, folder)
        found = next(folder.rglob(name))
        found.unlink()
        make(found)
        for command in commands(folder)[:5]:
            assert main(command) in (0, 1, 2)
            assert "Traceback" not in capfd.readouterr().err
