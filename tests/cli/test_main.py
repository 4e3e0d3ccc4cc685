"""The command as a whole: its table of subcommands, and what it says where it cannot do what it was asked for."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lightning_nanguard
from lightning_nanguard import NaNGuard, errors
from lightning_nanguard.cli.main import COMMANDS, main
from tests.classifier import config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "--config", "none.yaml"], "No such file or directory: none.yaml"),
        (["check", "--config", "none.yaml", "--model", "Model"], "'Model' names no class: write package.file:Class"),
        (["check", "--config", "none.yaml", "--model", "none.py:Model"], "there is no file none.py"),
        (["check", "--data", "no_such_module:Data"], "No module named 'no_such_module'"),
        (["check", "--data", "tests.classifier:numbers"], "tests.classifier has no class numbers; it has "),
        (["replay", "none"], "none holds no incident: there is no bundle.json"),
    ],
)
def test_commands_say_what_they_lack(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that cannot be carried out says why in one line, without the class of an exception."""
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"nanguard: {said}")


def test_an_error_in_the_code_of_the_user_names_its_class_and_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a user's module raises is shown with where it was raised."""
    (tmp_path / "raising_names.py").write_text("raise KeyError('x')\n")
    assert main(["check", "--data", f"{tmp_path}/raising_names.py:Data"]) == 2
    assert re.match(r"nanguard: KeyError: 'x' \(.*raising_names.py, line 1, in", capsys.readouterr().err)


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`nanguard` alone shows every command with what it does."""
    assert main([]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert all(command.NAME in shown and command.HELP in shown for command in COMMANDS)


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an optional package the error names the extra that brings it."""
    from importlib import import_module

    from lightning_nanguard.trainer.private import lightning_cli

    def without(*names: str) -> Callable[[str], Any]:
        def load(name: str) -> Any:
            if name in names:
                raise ModuleNotFoundError(name)
            return import_module(name)

        return load

    monkeypatch.setattr(errors, "import_module", without("safetensors.torch"))
    monkeypatch.setattr(lightning_cli, "import_module", without("jsonargparse"))
    with pytest.raises(ModuleNotFoundError, match=r"lightning-nanguard\[bundle\]"):
        NaNGuard(bundle_dir=tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-nanguard\[cli\]"):
        lightning_cli.from_config(config(tmp_path))


@pytest.mark.parametrize("module", ["lightning_nanguard", "lightning_nanguard.cli"])
def test_version(module: str) -> None:
    """`nanguard --version` tells the version, by every way to call it, and loads neither torch nor Lightning for it."""
    code = f"import runpy, sys; sys.argv[1:] = ['--version']\ntry: runpy.run_module('{module}', run_name='__main__')\n"
    code += "finally: assert not {'torch', 'numpy', 'pytorch_lightning', 'lightning'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"nanguard {lightning_nanguard.__version__}\n"), done.stderr


def test_each_command_is_a_module_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command has a file of its name, stands in the help, and says what it takes."""
    files = {path.stem for path in Path(lightning_nanguard.__file__).with_name("cli").glob("*.py")}
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert command.NAME.replace("-", "_") in files
        assert command.NAME in shown
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        assert "usage" in parser.format_help()
