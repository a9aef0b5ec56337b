"""`make full` goes on where it was interrupted."""

import os
import subprocess
import sys
from pathlib import Path

from packforcing.files import write_file

ROOT = Path(__file__).parents[1]


TESTS = """
import pytest

@pytest.mark.full
def test_long():
    print("long ran")

@pytest.mark.full
def test_broken():
    assert False

def test_short():
    print("short ran")
"""
RUN = (
    "import sys, pathlib, pytest, tests.full_run as plugin; "
    "plugin.RECORD = pathlib.Path(sys.argv[1]); "
    "pytest.main(['-q', '-s', '-m', '', '-p', 'tests.full_run', sys.argv[2]])"
)


def run(folder):
    return subprocess.run(
        [sys.executable, "-c", RUN, folder / "full.json", folder / "test_it.py"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_full_tests_that_passed_are_not_run_again_with_the_same_code(tmp_path):
    write_file(tmp_path / "test_it.py", TESTS.encode())
    first, second = run(tmp_path), run(tmp_path)
    assert first.count("long ran") == 1 and "1 failed, 2 passed" in first
    assert "long ran" not in second and "short ran" in second
    assert "1 failed, 1 passed, 1 deselected" in second and "in earlier runs: 1 full" in second
    record = tmp_path / "full.json"
    record.write_text(record.read_text().replace('"digest": "', '"digest": "of other code '))
    assert "1 failed, 2 passed" in run(tmp_path)
