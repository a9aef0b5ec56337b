"""The package as it is distributed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """The folder with the source distribution and the wheel, which build without a warning."""
    copy = tmp_path_factory.mktemp("dist") / "copy"
    left_out = shutil.ignore_patterns(".*cache", ".git", ".venv", "*.egg-info", "build", "out")
    shutil.copytree(ROOT, copy, ignore=left_out)
    output = subprocess.check_output(
        [sys.executable, "-c", BUILD], cwd=copy, stderr=subprocess.STDOUT, text=True
    )
    # one is said where the environment forbids compiled files
    lines = [line for line in output.splitlines() if "byte-compiling" not in line]
    assert not [line for line in lines if "warning" in line.lower()]
    return copy / "dist"
