"""Nothing is reported: no file is written into the user's home, no name is looked up.

The environment of the programs is made from nothing, as ONNX Runtime is silent where CI variables
are set. Each test has a control, ONNX Runtime without the opt-out, which does report.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 90  # ONNX Runtime looks its host up after about one minute

CONTROL = """
import sys, time, onnxruntime
from pathlib import Path
end = time.monotonic() + float(sys.argv[1])
onnxruntime.InferenceSession({model!r}, providers=["CPUExecutionProvider"])
while time.monotonic() < end:
    time.sleep(1)
"""
RENDER = """
import sys, time
from packforcing.runtime import Session, demo_bundle
end = time.monotonic() + float(sys.argv[1])
with Session.open(demo_bundle(), threads=1) as session:
    session.render("a red star", 0.5, "clip.mp4")
    for frames in session.stream("a red star", 3600):
        if time.monotonic() > end:
            break
"""
# what resolving a host's name or talking to one needs; a Unix socket stays on this machine
NETWORK = re.compile(r"/etc/resolv\.conf|AF_INET|nscd/socket")


def bare_environment(home: Path) -> dict[str, str]:
    """An environment of a user: a home, nothing that turns reports on or off."""
    home.mkdir(parents=True)
    names = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    return {**environment, "HOME": str(home), "USERPROFILE": str(home)}


def control_program() -> str:
    """A program that uses ONNX Runtime without this package."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 29) or os.name != "posix":
        pytest.skip("this ONNX Runtime has no usage reports that leave a file")
    return CONTROL.format(model=str(ROOT / "packforcing" / "demo" / "bundle" / "prompt.onnx"))


def start(code: str, folder: Path, seconds: float, *tool: str) -> subprocess.Popen[bytes]:
    """Start a program in an empty folder with a home of its own beside it."""
    environment = bare_environment(folder / "home")
    (folder / "work").mkdir()
    command = [*tool, sys.executable, "-c", code, str(seconds)]
    return subprocess.Popen(command, cwd=folder / "work", env=environment)


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_render_writes_nothing_but_its_result(tmp_path):
    control = start(control_program(), tmp_path / "control", 0)
    program = start(RENDER, tmp_path / "render", 0)
    assert (control.wait(), program.wait()) == (0, 0)
    assert "deviceid" in files_in(tmp_path / "control" / "home")  # what the opt-out is against
    assert files_in(tmp_path / "render") == ["clip.mp4", "home", "work"]


@pytest.mark.parametrize(
    "code",
    [
        "from packforcing.app.cli import main; main(['doctor'])",
        # the child that builds engines is started with nothing of its parent but the environment
        "import subprocess, sys, packforcing; subprocess.run([sys.executable, '-c', "
        "'import onnxruntime'], check=True)",
        "import packforcing.export.oracle, onnxruntime, polygraphy.backend.onnxrt",
    ],
)
def test_commands_and_their_children_write_nothing(tmp_path, code):
    assert start(code, tmp_path / "program", 0).wait() == 0
    assert files_in(tmp_path / "program") == ["home", "work"]


@pytest.mark.parametrize("value", ["0", "", "false"])
def test_the_environment_cannot_turn_reports_on(tmp_path, value):
    code = "import packforcing, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": value}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed == "1\n"


def test_the_model_hub_is_sent_no_versions_and_no_session(tmp_path):
    """What huggingface_hub, diffusers and transformers add to requests without the opt-out."""
    code = (
        "import packforcing; from huggingface_hub.utils import build_hf_headers;"
        "print(build_hf_headers()['user-agent'])"
    )
    environment = bare_environment(tmp_path / "home")
    agent = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert "torch/" not in agent and "session_id" not in agent and "agent/" not in agent


@pytest.mark.full
def test_a_long_render_looks_no_name_up(tmp_path):
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-o", os.devnull, "true"]).returncode:
        pytest.skip("strace is not installed or may not trace here")
    calls = "trace=open,openat,connect,sendto,sendmsg,sendmmsg"
    programs = {"control": control_program(), "render": RENDER}
    running = {
        name: start(code, tmp_path / name, SECONDS, strace, "-fqo", str(tmp_path / f"{name}.log"),
                    "-e", calls)
        for name, code in programs.items()
    }  # fmt: skip
    assert [process.wait() for process in running.values()] == [0, 0]
    lookups = {name: NETWORK.findall((tmp_path / f"{name}.log").read_text()) for name in programs}
    assert lookups["control"]
    assert not lookups["render"]
