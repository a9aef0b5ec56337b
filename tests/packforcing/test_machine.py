"""The cores and the memory of a process: control groups as systems lay them out, real affinity.

The trees are laid out as in cgroups(7), the kernel's cgroup-v2.rst and cgroup-v1, and as Docker,
Kubernetes, systemd and Slurm mount them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from packforcing.machine import cpu_cores, free_memory, total_memory

MACHINE_CORES, MACHINE_BYTES, FREE_BYTES = 64, 256 << 30, 200 << 30
GIB = 1 << 30
V2 = "30 23 0:27 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "3{n} 31 0:3{n} {root} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"
UNLIMITED = 9223372036854771712  # how version 1 writes it


@pytest.fixture(autouse=True)
def large_machine(monkeypatch):
    """A machine that has more than any group, and an environment that sets nothing."""
    machine = SimpleNamespace(total=MACHINE_BYTES, available=FREE_BYTES)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    cores = set(range(MACHINE_CORES))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores, raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: MACHINE_CORES, raising=False)
    for name in ("OMP_NUM_THREADS", "PYTHON_CPU_COUNT"):
        monkeypatch.delenv(name, raising=False)


def system(folder: Path, membership: str, mounts: str, files: dict[str, object]) -> Path:
    """Lay out /proc and /sys."""
    texts = {"proc/self/cgroup": membership, "proc/self/mountinfo": mounts, **files}
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return folder


def v1_mounts(root: str) -> str:
    return "".join(
        V1.format(n=n, root=root, name=name) for n, name in enumerate(("cpu,cpuacct", "memory"))
    )


G2 = "sys/fs/cgroup"
CPU1, MEMORY1 = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/memory"
DOCKER = "9:memory:/docker/ab12\n4:cpu,cpuacct:/docker/ab12\n1:name=systemd:/docker/ab12"

CORES = {
    "no groups at all": ("", "", {}, MACHINE_CORES),
    "version 2, no limit": ("0::/", V2, {f"{G2}/cpu.max": "max 100000"}, MACHINE_CORES),
    "docker --cpus 3": ("0::/", V2, {f"{G2}/cpu.max": "300000 100000"}, 3),
    "a part of a core": ("0::/", V2, {f"{G2}/cpu.max": "50000 100000"}, 1),
    "one core and a part": ("0::/", V2, {f"{G2}/cpu.max": "150000 100000"}, 2),
    "another period": ("0::/", V2, {f"{G2}/cpu.max": "40000 10000"}, 4),
    "systemd, the slice is smaller": (
        "0::/user.slice/app.slice/run-u1.scope",
        V2,
        {
            f"{G2}/user.slice/cpu.max": "200000 100000",
            f"{G2}/user.slice/app.slice/cpu.max": "max 100000",
            f"{G2}/user.slice/app.slice/run-u1.scope/cpu.max": "800000 100000",
        },
        2,
    ),
    "another group of the machine": (
        "0::/mine", V2,
        {f"{G2}/mine/cpu.max": "max 100000", f"{G2}/others/cpu.max": "100000 100000"},
        MACHINE_CORES,
    ),
    "version 1, docker": (
        DOCKER, v1_mounts("/docker/ab12"),
        {f"{CPU1}/cpu.cfs_quota_us": 400000, f"{CPU1}/cpu.cfs_period_us": 100000}, 4,
    ),
    "version 1, no limit": (
        DOCKER, v1_mounts("/docker/ab12"),
        {f"{CPU1}/cpu.cfs_quota_us": -1, f"{CPU1}/cpu.cfs_period_us": 100000}, MACHINE_CORES,
    ),
    "version 1, outside of a container": (
        DOCKER, v1_mounts("/"),
        {
            f"{CPU1}/docker/ab12/cpu.cfs_quota_us": 250000,
            f"{CPU1}/docker/ab12/cpu.cfs_period_us": 50000,
        },
        5,
    ),
    "version 1, a group that is not mounted here": (
        "4:cpu,cpuacct:/kubepods/pod1/ab12", v1_mounts("/kubepods/pod2"),
        {f"{CPU1}/cpu.cfs_quota_us": 600000, f"{CPU1}/cpu.cfs_period_us": 100000}, 6,
    ),
    "both versions": (
        f"{DOCKER}\n0::/", v1_mounts("/docker/ab12") + V2.replace("cgroup rw", "cgroup/unified rw"),
        {f"{CPU1}/cpu.cfs_quota_us": 700000, f"{CPU1}/cpu.cfs_period_us": 100000}, 7,
    ),
    "a mount point with a space": (
        "0::/", V2.replace("/sys/fs/cgroup ", "/sys/fs/c\\040g "),
        {"sys/fs/c g/cpu.max": "100000 100000"}, 1,
    ),
    "damaged files": ("0::/\nx", f"{V2}a line\n", {f"{G2}/cpu.max": "many 0"}, MACHINE_CORES),
}  # fmt: skip


@pytest.mark.parametrize(("membership", "mounts", "files", "expected"), CORES.values(), ids=CORES)
def test_cpu_time_of_control_groups_counts(tmp_path, membership, mounts, files, expected):
    root = system(tmp_path, membership, mounts.replace("{root}", "/"), files)
    assert cpu_cores(root) == expected


STAT2 = "anon 1\nfile 900\ninactive_file 268435456\nactive_file 268435456\nshmem 5"
STAT1 = "inactive_file 7\nactive_file 7\ntotal_inactive_file 1073741824\ntotal_active_file 0"
MEMORY = {
    "no groups at all": ("", "", {}, MACHINE_BYTES, FREE_BYTES),
    "docker --memory 8g": (
        "0::/", V2,
        {
            f"{G2}/memory.max": 8 * GIB, f"{G2}/memory.high": "max",
            f"{G2}/memory.current": 3 * GIB, f"{G2}/memory.stat": STAT2,
        },
        8 * GIB, 5 * GIB + GIB // 2,
    ),
    "memory.high is smaller": (
        "0::/", V2,
        {
            f"{G2}/memory.max": 8 * GIB, f"{G2}/memory.high": 6 * GIB,
            f"{G2}/memory.current": 2 * GIB, f"{G2}/memory.stat": "",
        },
        6 * GIB, 4 * GIB,
    ),
    "the group around is smaller and fuller": (
        "0::/pod/container", V2,
        {
            f"{G2}/pod/memory.max": 16 * GIB, f"{G2}/pod/memory.current": 14 * GIB,
            f"{G2}/pod/container/memory.max": 32 * GIB,
            f"{G2}/pod/container/memory.current": GIB,
        },
        16 * GIB, 2 * GIB,
    ),
    "the smallest limit is not the fullest": (
        "0::/pod/container", V2,
        {
            f"{G2}/pod/memory.max": 16 * GIB, f"{G2}/pod/memory.current": 15 * GIB,
            f"{G2}/pod/container/memory.max": 8 * GIB,
            f"{G2}/pod/container/memory.current": GIB,
        },
        8 * GIB, GIB,
    ),
    "above its limit": (
        "0::/", V2,
        {f"{G2}/memory.high": GIB, f"{G2}/memory.current": 2 * GIB}, GIB, 0,
    ),
    "version 1, docker": (
        DOCKER, v1_mounts("/docker/ab12"),
        {
            f"{MEMORY1}/memory.limit_in_bytes": 4 * GIB,
            f"{MEMORY1}/memory.usage_in_bytes": 2 * GIB, f"{MEMORY1}/memory.stat": STAT1,
        },
        4 * GIB, 3 * GIB,
    ),
    "version 1, no limit": (
        DOCKER, v1_mounts("/docker/ab12"),
        {
            f"{MEMORY1}/memory.limit_in_bytes": UNLIMITED,
            f"{MEMORY1}/memory.usage_in_bytes": 2 * GIB, f"{MEMORY1}/memory.stat": STAT1,
        },
        MACHINE_BYTES, FREE_BYTES,
    ),
    "a limit above the machine": (
        "0::/", V2, {f"{G2}/memory.max": 512 * GIB, f"{G2}/memory.current": 0},
        MACHINE_BYTES, FREE_BYTES,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("membership", "mounts", "files", "total", "free"), MEMORY.values(), ids=MEMORY
)
def test_memory_of_control_groups_counts(tmp_path, membership, mounts, files, total, free):
    root = system(tmp_path, membership, mounts.replace("{root}", "/"), files)
    assert (total_memory(root), free_memory(root)) == (total, free)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "3,2"}, 3),  # nested loops
        ({"OMP_NUM_THREADS": "99"}, 8),
        ({"OMP_NUM_THREADS": "many"}, 8),
        ({"OMP_NUM_THREADS": "0"}, 8),
        ({"PYTHON_CPU_COUNT": "12"}, 12),  # replaces what the system says, as in Python 3.13
        ({"PYTHON_CPU_COUNT": "default"}, 8),
        ({"PYTHON_CPU_COUNT": "12", "OMP_NUM_THREADS": "4"}, 4),
    ],
)
def test_environment_variables_count(tmp_path, monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    root = system(tmp_path, "0::/", V2.format(root="/"), {f"{G2}/cpu.max": "800000 100000"})
    assert cpu_cores(root) == expected


@pytest.mark.skipif(not shutil.which("taskset"), reason="binds a process with taskset")
def test_a_bound_process_counts_its_own_cores():
    code = "from packforcing.machine import cpu_cores; print(cpu_cores())"
    environment = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    core = min(os.sched_getaffinity(os.getppid())) if sys.platform == "linux" else 0
    command = ["taskset", "-c", str(core), sys.executable, "-c", code]
    assert subprocess.check_output(command, env=environment, text=True) == "1\n"
