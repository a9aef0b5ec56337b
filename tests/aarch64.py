"""Debian's Python for aarch64, with what this package needs to render, run by QEMU.

Nothing is installed and nobody has to be root: apt-get and pip put everything into one folder of
the user's cache, half a gigabyte, which is kept for the next run.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock
from platformdirs import user_cache_path

ROOT = Path(__file__).parents[1]
LOADING_SECONDS = 1200  # for one call of apt-get or pip
RUNNING_SECONDS = 3600  # for one emulated command, on a busy machine

# QEMU 7.2, a release earlier, shows the /proc/cpuinfo of this machine, and ONNX Runtime 1.32
# crashes on it.
RELEASE = "trixie"
GLIBC = 41  # 2.41
EMULATOR = "qemu-aarch64"
PYTHON = "python3.13"
PACKAGES = (f"{PYTHON}:arm64", "libstdc++6:arm64", "qemu-user")
SOURCES = "deb [signed-by={}] https://deb.debian.org/debian {} main\n"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

TEST_PACKAGES = ("hypothesis", "opencv-python-headless", "pytest")  # tests.helpers reads frames
# Like a Jetson Orin's, without SVE and SME, which QEMU's default CPU has and emulates slowly.
CPU = "cortex-a76"


class Unavailable(Exception):
    """This machine cannot load or run it."""


class Aarch64Python(NamedTuple):
    """An emulated interpreter."""

    folder: Path

    def run(self, *arguments: object, cwd: Path, package: Path) -> subprocess.CompletedProcess[str]:
        """Run the interpreter.

        Args:
            cwd: Folder to run it in.
            package: Folder from which `packforcing` is imported.
        """
        root = self.folder / "root"
        python = root / "usr" / "bin" / PYTHON
        command = [self.folder / EMULATOR, "-cpu", CPU, "-L", root, python, *arguments]
        variables = {
            **os.environ,
            "PYTHONPATH": f"{package}{os.pathsep}{self.folder / 'site'}",
            "PYTHONPYCACHEPREFIX": str(self.folder / "compiled"),
        }
        return subprocess.run(
            list(map(str, command)), cwd=cwd, env=variables, timeout=RUNNING_SECONDS,
            capture_output=True, text=True,
        )  # fmt: skip


def aarch64_python() -> Aarch64Python:
    """Return the interpreter; load it first if that was not done yet.

    Raises:
        Unavailable: With the reason.
    """
    if sys.platform != "linux" or platform.machine() == "aarch64":
        raise Unavailable("aarch64 is emulated on Linux machines of another kind")
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise Unavailable(f"there is no {program} to load Debian's packages with")
    if not KEYRING.exists():
        raise Unavailable(f"there is no {KEYRING}: install debian-archive-keyring")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"], *project["optional-dependencies"]["cpu"], *TEST_PACKAGES
    ]  # fmt: skip
    recipe = "\n".join([RELEASE, *PACKAGES, *requirements])
    folder = user_cache_path("packforcing-tests", appauthor=False) / "aarch64"
    folder.parent.mkdir(parents=True, exist_ok=True)
    finished = folder / "recipe.txt"  # written last
    with FileLock(folder.with_suffix(".lock")):
        if not finished.exists() or finished.read_text() != recipe:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            _load_debian(folder)
            _load_wheels(folder / "site", requirements)
            finished.write_text(recipe)
    return Aarch64Python(folder)


def _load_debian(folder: Path) -> None:
    """Load and unpack interpreter and emulator, with a package database of their own."""
    apt, root = folder / "apt", folder / "root"
    for name in ("lists/partial", "archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(SOURCES.format(KEYRING, RELEASE))
    native = _call("dpkg", "--print-architecture").strip()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": f"arm64,{native}",
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt,
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
    }
    options = [f"-o{name}={value}" for name, value in settings.items()]
    _call("apt-get", "-qq", *options, "update")
    packages = [name if ":" in name else f"{name}:{native}" for name in PACKAGES]
    how = "--yes", "--no-install-recommends", "--download-only"
    _call("apt-get", "-qq", *options, *how, "install", *packages)
    root.mkdir()
    (root / "lib").symlink_to("usr/lib")  # of the package base-files, which nothing else needs
    for package in sorted((apt / "archives").glob("*.deb")):
        _call("dpkg", "-x", package, apt / "qemu" if package.name.startswith("qemu") else root)
    (apt / "qemu" / "usr" / "bin" / EMULATOR).rename(folder / EMULATOR)  # of 300 MB for all CPUs
    shutil.rmtree(apt)


def _load_wheels(folder: Path, requirements: list[str]) -> None:
    """Load wheels as pip on an aarch64 machine would."""
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, GLIBC + 1)]
    _call(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", folder,
        "--only-binary=:all:", "--python-version", PYTHON.removeprefix("python"), *platforms,
        *requirements,
    )  # fmt: skip


def _call(*command: object) -> str:
    """Run a program that loads something.

    Raises:
        Unavailable: It failed.
        AssertionError: No version of a requirement has a wheel for aarch64, while others are there.
    """
    arguments = list(map(str, command))
    try:
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=LOADING_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{arguments[0]} took more than {LOADING_SECONDS} s") from error
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        assert not re.search(r"\(from versions: (?!none)", result.stderr), result.stderr
        lines = [line for line in result.stderr.splitlines() if re.match("E:|ERROR:", line)]
        raise Unavailable(f"{arguments[0]}: {lines[0] if lines else result.stderr[-200:]}")
    return result.stdout
