"""The commands of the README run as they are written, or are listed here with a reason."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = {
    "make live": "serves a page until it is stopped (test_serve.py)",
    "packforcing serve --open": "as make live",
    "packforcing serve": "as make live",
    "make test": "these tests",
    "make full": "these tests",
    "make docs": "its programs stay in the environment that the clone borrows from (checks.yml)",
    "make figures": "takes days",
    "packforcing compare": "renders for hours (test_compare.py)",
    "pytest -m gpu": "needs a GPU",
    'packforcing render "a red star" --bundle half --backend tensorrt-rtx --out star.mp4': (
        "needs a GPU"
    ),
}
PROGRAMS = ("make", "packforcing", "pip", "pytest", "python3", ".")


def blocks(language: str) -> list[list[str]]:
    """The lines of each code block in a language, without comments."""
    texts = re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [[line.partition("  #")[0].strip() for line in text.splitlines()] for text in texts]


def spans() -> list[str]:
    """Commands within sentences and tables; those with placeholders, as in PATH, are not whole."""
    text = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    return [
        span
        for span in dict.fromkeys(" ".join(s.split()) for s in re.findall(r"`([^`]+)`", text))
        if span.partition(" ")[0] in PROGRAMS and " " in span and not re.search(
            r"(?<![\"\w])\[?[A-Z]{3,}", span
        )
    ]  # fmt: skip


def test_each_command_is_run_or_has_a_reason():
    """And no reason is left over of a command that the README has no more."""
    commands = [line for block in blocks("sh") for line in block]
    assert {line.partition(" ")[0] for line in commands} <= set(PROGRAMS)
    assert len(commands) > 12 and len(spans()) > 8
    assert NOT_RUN.keys() <= {*commands, *spans()}
    assert [set(block) - set(commands) for block in blocks("powershell")] == [
        {"py -m venv .venv", r".venv\Scripts\Activate.ps1"}  # the rest is the same on Windows
    ]


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="blocks for PowerShell are not run")
def test_the_commands_run_in_a_fresh_clone(tmp_path):
    """In an environment that has the packages of this one, so that pip installs this one alone."""
    clone = tmp_path / "clone"
    if (ROOT / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    else:  # a source distribution
        ignored = shutil.ignore_patterns(".venv", "build", "dist", "out", "*.egg-info")
        shutil.copytree(ROOT, clone, ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", clone / ".venv"], check=True)
    scheme = {"base": str(clone / ".venv"), "platbase": str(clone / ".venv")}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib"))
    environment = {
        name: value for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }  # fmt: skip
    for lines in (*blocks("sh"), *([span] for span in spans())):
        script = [line for line in lines if line not in NOT_RUN]
        if not lines[0].startswith("make"):
            script.insert(0, ". .venv/bin/activate")
        result = subprocess.run(
            ["bash", "-ec", "\n".join(script)], cwd=clone, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        print(*script, result.stdout, sep="\n")
        assert result.returncode == 0, f"{shlex.join(script)}\n{result.stdout}"
    assert (clone / "square.mp4").is_file() and (clone / "out/demo/demo.html").is_file()
