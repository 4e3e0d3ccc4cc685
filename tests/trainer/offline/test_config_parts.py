"""A mistake in the guard's part of a YAML file is told in one line, with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightning_nanguard
from lightning_nanguard.cli.main import main
from lightning_nanguard.trainer.offline.config_parts import wrong_parts

pytest.importorskip("yaml")

CONFIG = """
trainer:
  callbacks:
    - class_path: pytorch_lightning.callbacks.LearningRateMonitor
    - class_path: lightning_nanguard.{name}
      init_args:
        {argument}
        budget: {{max_rollbacks: 5}}
        remedies:
          - class_path: lightning_nanguard.ReduceLR
            init_args: {{{inner}}}
"""

MISTAKES = {
    "nothing": ("NaNGuard", "quarantine: true", "factor: 0.5", []),
    "class": (
        "NanGuard",
        "quarantine: true",
        "factor: 0.5",
        ["trainer.callbacks[1]: there is no lightning_nanguard.NanGuard. Did you mean 'NaNGuard'?"],
    ),
    "argument": (
        "NaNGuard",
        "quarantin: true",
        "factor: 0.5",
        ["trainer.callbacks[1]: NaNGuard has no argument 'quarantin'. Did you mean 'quarantine'?"],
    ),
    "value": (
        "NaNGuard",
        "max_snapshots: 0",
        "factor: 0.5",
        ["trainer.callbacks[1]: NaNGuard(max_snapshots=0): expected an integer of at least 1."],
    ),
    "word": (
        "NaNGuard",
        "act_on: evidance",
        "factor: 0.5",
        ["trainer.callbacks[1]: NaNGuard(act_on='evidance'): expected"],
    ),
    "argument of a remedy": (
        "NaNGuard",
        "observe: false",
        "facter: 0.5",
        [
            "trainer.callbacks[1].init_args.remedies[0]: ReduceLR has no argument 'facter'. Did you mean 'factor'?",
        ],
    ),
    "nothing like it": (
        "Rollback",
        "xyz: 1",
        "factor: 2.0",
        [
            "trainer.callbacks[1]: Rollback has no argument 'xyz'. There are: ",
            "trainer.callbacks[1]: Rollback has no argument 'budget'. There are: ",
            "trainer.callbacks[1]: Rollback has no argument 'remedies'. There are: ",
            "trainer.callbacks[1].init_args.remedies[0]: ReduceLR(factor=2.0): expected",
        ],
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_each_mistake_in_one_line(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Place, part, argument or value, and the name that is most like it; a right file gives nothing to say."""
    name, argument, inner, expected = MISTAKES[kind]
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(name=name, argument=argument, inner=inner))
    found = wrong_parts(path)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found
    assert "no Trainer ever called it" not in caplog.text


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`nanguard check` names the mistake before it looks at anything else, and fails."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(name="NaNGuard", argument="quarantin: true", inner="factor: 0.5"))
    assert main(["check", "--config", str(path)]) == 2
    assert capsys.readouterr().err == (
        "nanguard: trainer.callbacks[1]: NaNGuard has no argument 'quarantin'. Did you mean 'quarantine'?\n"
    )


def test_a_misspelt_name_of_the_package() -> None:
    """Importing what is not there names what is most like it."""
    with pytest.raises(AttributeError, match=r"has no attribute 'NanGuard'\. Did you mean 'NaNGuard'\?"):
        _ = lightning_nanguard.NanGuard
    with pytest.raises(AttributeError, match=r"has no attribute 'xyz'$"):
        _ = lightning_nanguard.xyz
