"""The package as an index shows it."""

import re
import runpy
from pathlib import Path

import setuptools

ROOT = Path(__file__).parents[2]


def test_the_readme_of_the_package_links_only_to_the_web(monkeypatch):
    """A package index has no files beside the README: relative links and pictures would break."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    runpy.run_path(str(ROOT / "setup.py"))
    page, source = arguments["long_description"], (ROOT / "README.md").read_text("utf-8")
    assert "](docs/" in source  # there is something to do
    assert re.findall(r"\]\(([^)]*)\)", page) == re.findall(r"\]\((https?:[^)]*)\)", source)
    assert re.findall("^#.*", page, re.MULTILINE) == re.findall("^#.*", source, re.MULTILINE)
