"""Fixtures of the command line's tests."""

import shutil
from pathlib import Path

import pytest

from packforcing.runtime import demo_bundle
from tests.batches import MANY, prepare, render_alone


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


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    """Two hundred videos of the demo model, by ID, rendered one after the other."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return render_alone(
        demo_bundle(), prepare(folder / "jobs", demo_bundle(), MANY)[1], folder / "alone"
    )
