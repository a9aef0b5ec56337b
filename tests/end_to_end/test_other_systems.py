"""What the code calls exists on Windows and macOS, by the type stubs of Python's library."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("runtime", "export", "calibration", "evaluation", "app")


@pytest.mark.full
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_types_hold_on(platform, tmp_path):
    """The stubs leave out what a platform lacks, and say where it returns something else."""
    pytest.importorskip("mypy")
    package = tmp_path / "packforcing"
    package.mkdir()
    for path in [*(ROOT / "packforcing").iterdir(), *map(ROOT.joinpath, ROOMS)]:
        (package / path.name).symlink_to(path)
    command = [
        sys.executable, "-m", "mypy", "--platform", platform, "--config-file",
        ROOT / "pyproject.toml", "--cache-dir", tmp_path / "cache", "packforcing",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
