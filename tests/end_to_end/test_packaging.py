"""The package as an index shows it, and what its files hold."""

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import setuptools

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "packforcing" / "demo" / "bundle"


def test_the_readme_of_the_package_links_only_to_the_web(monkeypatch):
    """A package index has no files beside the README: relative links and pictures would break."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    runpy.run_path(str(ROOT / "setup.py"))
    page, source = arguments["long_description"], (ROOT / "README.md").read_text("utf-8")
    assert "](docs/" in source  # there is something to do
    assert re.findall(r"\]\(([^)]*)\)", page) == re.findall(r"\]\((https?:[^)]*)\)", source)
    assert re.findall("^#.*", page, re.MULTILINE) == re.findall("^#.*", source, re.MULTILINE)


BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"


def test_the_source_distribution_has_the_tests_and_the_wheel_what_a_first_video_needs(tmp_path):
    left_out = shutil.ignore_patterns(".*cache", ".git", ".venv", "*.egg-info", "build", "out")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out)
    output = subprocess.check_output(
        [sys.executable, "-c", BUILD], cwd=tmp_path / "copy", stderr=subprocess.STDOUT, text=True
    )
    # one is said where the environment forbids compiled files
    lines = [line for line in output.splitlines() if "byte-compiling" not in line]
    assert not [line for line in lines if "warning" in line.lower()]
    (source,) = (tmp_path / "copy/dist").glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py")}
    formats = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/formats/*/*.onnx")}
    assert names >= {*tests, *formats, "constraints.txt", "Dockerfile", "docs/demo.png"}
    (wheel,) = (tmp_path / "copy/dist").glob("*.whl")
    assert wheel.stat().st_size < 20e6
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    bundle = {f"packforcing/demo/bundle/{path.name}" for path in BUNDLE.iterdir()}
    assert files > {*bundle, "packforcing/py.typed", "packforcing/app/server/page/index.html"}
    assert "packforcing/runtime/gpus.toml" in files
    assert not [name for name in files if name.startswith("tests")]
