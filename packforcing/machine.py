"""The CPU, its cores and the memory that this process may use, which may be less than is there.

A process may be bound to some cores (taskset, a batch system, a container's cpuset), and Linux
control groups (containers, systemd, Slurm, Kubernetes) limit CPU time and memory. A group lies in
another one, whose limits hold too: the smallest counts. See cgroups(7) and the kernel's cgroup-v2.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

ROOT = Path("/")
# lines of /proc/self/cgroup, /proc/self/mountinfo and memory.stat
_MEMBERSHIP = re.compile(r"^(\d+):([^:]*):(/.*)$", re.MULTILINE)
_MOUNT = re.compile(r"^\d+ \d+ \S+ (\S+) (\S+) .*? - (cgroup2?) \S+ (\S+)$", re.MULTILINE)
_COUNTER = re.compile(r"^(\w+) (\d+)$", re.MULTILINE)


def cpu_cores(root: Path = ROOT) -> int:
    """Count the CPU cores that this process may keep busy, at least 1.

    The smallest of: cores that it is bound to; CPU time of its control groups, where a part of a
    core counts as one; `OMP_NUM_THREADS`. `PYTHON_CPU_COUNT` replaces the first two, as in Python
    from 3.13.

    Args:
        root: Where the system's folders /proc and /sys are.
    """
    cores = _variable("PYTHON_CPU_COUNT") or min([_bound_cores(), *_cpu_limits(root)])
    return min(cores, _variable("OMP_NUM_THREADS") or cores)


def processor_name(root: Path = ROOT) -> str:
    """Return the name of the CPU, or its architecture where the system does not tell."""
    names = re.findall(r"model name\s*: (.*)", _text(root / "proc/cpuinfo"))
    return names[0] if names else platform.processor() or platform.machine()


def total_memory(root: Path = ROOT) -> int:
    """Return the bytes of host memory that this process may use at most.

    Args:
        root: Where the system's folders /proc and /sys are.
    """
    limits = [limit for limit, _ in _memory_limits(root)]
    return min([psutil.virtual_memory().total, *limits])


def free_memory(root: Path = ROOT) -> int:
    """Return the bytes of host memory that this process can still get without swapping.

    Args:
        root: Where the system's folders /proc and /sys are.
    """
    free = [max(0, limit - used) for limit, used in _memory_limits(root)]
    return min([psutil.virtual_memory().available, *free])


def _variable(name: str) -> int | None:
    """Return an environment variable's number; of a list, its first, for the outermost loop."""
    text = os.environ.get(name, "").partition(",")[0].strip()
    return int(text) or None if text.isascii() and text.isdigit() else None


def _bound_cores() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    if hasattr(psutil.Process, "cpu_affinity"):  # Windows
        return len(psutil.Process().cpu_affinity() or ()) or 1
    return os.cpu_count() or 1


def _cpu_limits(root: Path) -> Iterator[int]:
    """Yield the CPU time that each control group may take, in cores."""
    for group in _control_groups("cpu", root):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        quota = quota or _text(group / "cpu.cfs_quota_us")  # version 1
        period = period or _text(group / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():  # no limit is "max", or -1
            yield max(1, math.ceil(int(quota) / max(1, int(period))))


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of each control group that limits memory, in bytes.

    Cached files do not count as use: the system drops them where memory is needed.
    """
    for group in _control_groups("memory", root):
        files = "memory.max", "memory.high", "memory.limit_in_bytes"
        limits = [int(text) for name in files if (text := _text(group / name)).isdigit()]
        used = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
        stat = _text(group / "memory.stat")
        counters = {name: int(size) for name, size in _COUNTER.findall(stat)}
        cached_bytes = sum(
            # version 1 counts this group alone and, as the total, the groups inside it too
            counters.get(f"total_{kind}", counters.get(kind, 0))
            for kind in ("inactive_file", "active_file")
        )
        if limits:
            yield min(limits), max(0, int(used or 0) - cached_bytes)


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups that a controller may limit, innermost first.

    Version 1 has a tree of groups per controller, version 2 one for all. A container sees a tree
    from its own group on, which is the mount's root then.
    """
    memberships = _MEMBERSHIP.findall(_text(root / "proc/self/cgroup"))
    for mount_root, mount_point, kind, options in _MOUNT.findall(
        _text(root / "proc/self/mountinfo")
    ):
        for number, controllers, group in memberships:
            shared = kind == "cgroup2" and number == "0"
            own = kind == "cgroup" and controller in options.split(",")
            if shared or (own and controller in controllers.split(",")):
                try:
                    names = PurePosixPath(group).relative_to(mount_root).parts
                except ValueError:  # the group is not in the part that is mounted
                    names = ()
                for depth in range(len(names), -1, -1):
                    yield root.joinpath(
                        mount_point.replace("\\040", " ").lstrip("/"), *names[:depth]
                    )


def _text(path: Path) -> str:
    """Return a file's text; empty where it cannot be read."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8").strip()
    return ""
