"""How much memory of the host can still be taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard.state.host_memory import available_host_memory

MiB = 1 << 20


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def kernel(root: Path, mib: int) -> None:
    write(root, proc__meminfo=f"MemTotal: 9999999 kB\nMemFree: 1 kB\nMemAvailable: {mib << 10} kB\n")


def test_the_kernel_says_what_is_available(tmp_path: Path) -> None:
    """Without a control group ``MemAvailable`` counts; where nothing is known, nothing is limited."""
    assert available_host_memory(tmp_path) > 1 << 60
    kernel(tmp_path, 500)
    assert available_host_memory(tmp_path) == 500 * MiB


@pytest.mark.parametrize(
    ("limits", "available"),
    [({"": 400}, 300), ({"job": 200, "": 400}, 100), ({"job": None, "": 400}, 300), ({"job": None}, 500)],
    ids=str,
)
def test_each_control_group_limits(limits: dict[str, int | None], available: int, tmp_path: Path) -> None:
    """The limit of a group holds for those below it; files that were read are given back where memory is needed."""
    kernel(tmp_path, 500)
    write(tmp_path, proc__self__cgroup="0::/job/step\n")
    base = tmp_path / "sys/fs/cgroup"
    (base / "job/step").mkdir(parents=True)
    for name, limit in limits.items():
        (base / name / "memory.max").write_text("max" if limit is None else str(limit * MiB))
        (base / name / "memory.current").write_text(str(120 * MiB))
        (base / name / "memory.stat").write_text(f"anon 1\ninactive_file {20 * MiB}\n")
    assert available_host_memory(tmp_path) == available * MiB


def test_version_one_of_control_groups(tmp_path: Path) -> None:
    """Inside of a container the path may be one of the host: then the limit of the mounted group counts."""
    kernel(tmp_path, 500)
    write(tmp_path, proc__self__cgroup="5:cpu:/x\n4:memory:/docker/abc\n")
    base = tmp_path / "sys/fs/cgroup/memory"
    base.mkdir(parents=True)
    (base / "memory.limit_in_bytes").write_text(str(300 * MiB))
    (base / "memory.usage_in_bytes").write_text(str(250 * MiB))
    (base / "memory.stat").write_text(f"total_inactive_file {50 * MiB}\n")
    assert available_host_memory(tmp_path) == 100 * MiB
