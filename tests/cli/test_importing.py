"""Classes named on a command line are found by module or by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard.cli.importing import load


def test_by_module_and_by_file(tmp_path: Path) -> None:
    """A name is looked up in its module, also within a class; the folder of a file becomes importable."""
    (tmp_path / "nanguard_names.py").write_text("class Outer:\n    class Inner:\n        pass\n")
    assert load("pathlib:Path") is Path
    assert load(f"{tmp_path}/nanguard_names.py:Outer.Inner").__qualname__ == "Outer.Inner"
    assert load("nanguard_names:Outer").__name__ == "Outer"


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("Path", ValueError, "write package.file:Class"),
        ("none.py:Path", FileNotFoundError, "there is no file none.py"),
        ("lightning_nanguard.cli.importing:Load", ValueError, r"importing has no class Load; it has load\.$"),
        ("lightning_nanguard.cli.importing:load.er", ValueError, r"importing has no class load\.er; it has load\.$"),
        ("lightning_nanguard.cli:Load", ValueError, r"cli has no class Load\.$"),
        ("no_such_module_here:Path", ModuleNotFoundError, "no_such_module_here"),
    ],
)
def test_what_cannot_be_found(name: str, error: type[Exception], said: str) -> None:
    """What is missing is named."""
    with pytest.raises(error, match=said):
        load(name)
