"""Fixtures of the command line's tests."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def bundle(tiny_bundle, tmp_path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def out(tmp_path) -> Path:
    """An empty folder, for results."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder
