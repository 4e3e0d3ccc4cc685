"""Reads how much host memory is free, from the kernel and from the limits of control groups."""

from __future__ import annotations

import sys
from pathlib import Path

_NOT_KNOWN = sys.maxsize


def available_host_memory(root: Path = Path("/")) -> int:
    """Bytes that processes can still take here: the least of ``MemAvailable`` and what each control group leaves.

    It is a very large number if the system does not tell, as outside of Linux.

    Args:
        root: The folder that holds ``proc`` and ``sys``.
    """
    return min([_from_kernel(root), *_from_control_groups(root)])


def _from_kernel(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) << 10
    return _NOT_KNOWN


def _from_control_groups(root: Path) -> list[int]:
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = base / path.strip("/")
        # A limit also holds for all groups below. Inside a container the path may be that of the host.
        groups = [own, *own.parents[: len(own.relative_to(base).parts)]] if own.exists() else [base]
        found += [_left_by(group, *names) for group in groups]
    return found


def _left_by(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int:
    limit, used = _text(group / limit_name).strip(), _text(group / usage_name).strip()
    if not (limit.isdigit() and used.isdigit()):
        return _NOT_KNOWN
    # The kernel counts cached files as used, but frees them if memory is needed.
    cached = 0
    for line in _text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == cache_name:
            cached = int(value)
    return max(0, int(limit) - int(used) + cached)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
