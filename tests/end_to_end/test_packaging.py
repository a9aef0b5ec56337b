"""The package as an index shows it, and what its files hold."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "packforcing" / "demo" / "bundle"
ROOMS = ("runtime", "export", "calibration", "evaluation", "app")


def test_the_readme_of_the_package_links_only_to_the_web(monkeypatch):
    """A package index has no files beside the README: relative links and pictures would break."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    runpy.run_path(str(ROOT / "setup.py"))
    page, source = arguments["long_description"], (ROOT / "README.md").read_text("utf-8")
    assert "](docs/" in source  # there is something to do
    assert re.findall(r"\]\(([^)]*)\)", page) == re.findall(r"\]\((https?:[^)]*)\)", source)
    assert re.findall("^#.*", page, re.MULTILINE) == re.findall("^#.*", source, re.MULTILINE)


LARGEST_INSTALL = 345e6  # bytes on the disk, with what renders on the CPU


def test_the_source_distribution_has_the_tests_and_the_wheel_what_a_first_video_needs(dist):
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py")}
    formats = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/formats/*/*.onnx")}
    assert names >= {*tests, *formats, "constraints.txt", "Dockerfile", "docs/demo.png"}
    (wheel,) = dist.glob("*.whl")
    assert wheel.stat().st_size < 20e6
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    bundle = {f"packforcing/demo/bundle/{path.name}" for path in BUNDLE.iterdir()}
    assert files > {*bundle, "packforcing/py.typed", "packforcing/app/server/page/index.html"}
    assert "packforcing/runtime/gpus.toml" in files
    assert not [name for name in files if name.startswith("tests")]


@pytest.mark.full
def test_the_tests_of_the_source_distribution_collect(dist, tmp_path):
    """With this environment's packages, and with the package that it has inside."""
    (source,) = dist.glob("*.tar.gz")
    shutil.unpack_archive(source, tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    rooms = tmp_path / "rooms" / "packforcing"
    rooms.mkdir(parents=True)
    for path in [*(folder / "packforcing").iterdir(), *map(folder.joinpath, ROOMS)]:
        (rooms / path.name).symlink_to(path)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "tests"]
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(rooms.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:]
    counts = re.findall(r"^tests/\S+: (\d+)$", result.stdout, re.MULTILINE)  # of each file
    assert sum(map(int, counts)) > 1000


COMPLETION = """
eval "$(_PACKFORCING_COMPLETE=bash_source packforcing)"
complete_words() { COMPREPLY=(); COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
  _packforcing_completion packforcing; echo "${COMPREPLY[@]}"; }
complete_words packforcing insp
complete_words packforcing render --see
"""


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="asks bash for completions")
def test_a_fresh_environment_renders_serves_and_completes_in_an_empty_folder(dist, tmp_path):
    """Packages come from the index that pip is configured for."""
    (wheel,) = dist.glob("*.whl")
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    venv.create(environment, with_pip=True)
    variables = {
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)
    }  # fmt: skip

    def call(*command):
        return subprocess.run(
            list(map(str, command)), cwd=empty, env=variables, text=True, check=True,
            stdout=subprocess.PIPE,
        ).stdout  # fmt: skip

    def install(extras):
        constraints = ROOT / "constraints.txt"
        call(
            "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            constraints,
            f"{wheel}[{extras}]",
        )

    install("cpu")
    call(
        "python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", "pip"
    )  # those are not ours
    used_kb = call("du", "-sk", *(environment / "lib").glob("*/site-packages")).split()[0]
    print(f"site-packages: {int(used_kb) * 1024 / 1e6:.0f} MB, wheel: {wheel.stat().st_size:,} B")
    assert int(used_kb) * 1024 < LARGEST_INSTALL
    assert call("bash", "-c", COMPLETION).split() == ["inspect", "--seed"]
    call("packforcing", "demo", "--seconds", "2")
    assert "a red star" in call("packforcing", "inspect", "out/demo/demo.mp4")
    (empty / "jobs.txt").write_text("a red star\na blue circle over sand dots\n")
    call("packforcing", "batch", "jobs.txt", "--out", "many", "--seconds", "0.5")
    assert len(list((empty / "many").glob("*.mp4"))) == 2
    missing = subprocess.run(
        ["packforcing", "serve"], env=variables, capture_output=True, text=True
    )
    assert missing.returncode == 2 and "packforcing[serve]" in missing.stderr

    call("python", "-m", "ensurepip")
    install("cpu,serve")
    command = ["packforcing", "serve", "--port", "0", "--out", "jobs"]
    with subprocess.Popen(
        command, cwd=empty, env=variables, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            url = server.stdout.readline().strip()
            with urllib.request.urlopen(url, timeout=60) as page:
                assert b"<title>" in page.read()
            assert post_job(url) == "completed"
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 143


def post_job(url: str) -> str:
    """Post a job to the server and wait for its end."""
    fields = {"prompt": "a red star over navy stripes", "seconds": "1"}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}v1/videos", json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        job = json.load(answer)
    while job["status"] in ("queued", "in_progress"):
        time.sleep(0.2)
        with urllib.request.urlopen(f"{url}v1/videos/{job['id']}", timeout=60) as answer:
            job = json.load(answer)
    return job["status"]
