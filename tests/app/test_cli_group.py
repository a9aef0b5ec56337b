"""The group of commands: help, imports on demand, errors in one line."""

import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from packforcing.app.cli import main
from packforcing.app.cli.group import COMMANDS
from tests.helpers import PROMPT, assert_one_line, run

HEAVY = "torch", "onnx", "onnxruntime", "av", "cv2", "rich", "PIL"


def test_without_a_command_the_help_is_shown():
    result = run()
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == run("--help").stdout


def test_help_describes_each_command_in_one_line():
    """In one line of a terminal of 80 columns, which click would end with dots."""
    listing = run("--help").stdout.partition("Make videos:\n")[2].partition("  Environment")[0]
    commands = [line for line in listing.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in commands] == list(COMMANDS)
    assert [line for line in commands if not line.endswith(".") or line.endswith("...")] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\n +packforcing {command}\b", result.stdout)


@pytest.mark.parametrize(
    "code", ["import packforcing", "import packforcing.runtime", "main(['--help'])"]
)
def test_imports_and_help_load_nothing_heavy(code):
    program = f"""
import atexit, sys
atexit.register(lambda: print("loaded:", *sorted(set(sys.modules) & set({HEAVY!r}))))
from packforcing.app.cli import main
from packforcing.app.cli.group import COMMANDS
{code}
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "loaded:", result.stderr


@pytest.mark.parametrize("word", ["--bogus", "bogus"])
def test_an_unknown_command_is_refused(word):
    result = run(word)
    assert_one_line(result.exit_code, result.stdout, result.stderr, f"No such .*{word}")


def test_a_name_that_the_console_cannot_encode_is_escaped(tiny_bundle, out):
    command = [sys.executable, "-m", "packforcing.app.cli", "render", PROMPT,
               "--bundle", tiny_bundle, "--out", out / "\u8996.mp4", "--seconds", "1"]  # fmt: skip
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    result = subprocess.run(command, capture_output=True, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"\u8996.mp4: 8 frames" in result.stdout
    assert [path.name for path in out.iterdir()] == ["\u8996.mp4"]


@pytest.mark.parametrize("encoding", ["cp437", "cp1252", "ascii"])
@pytest.mark.parametrize(
    "command", ["--help", "render --help", "doctor", "models", "inspect", "plan --budget 4,8"]
)
def test_what_is_printed_is_in_the_encoding_of_every_console(command, encoding):
    """Those of Windows have no dashes, ellipses or box lines in common; nothing is escaped."""
    result = CliRunner(charset=encoding).invoke(main, command.split())
    assert result.exit_code == 0, result.output
    assert not re.search(rb"\\[xuU][0-9a-f]{2}|\?\?", result.stdout_bytes)
