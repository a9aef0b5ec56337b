"""The wheel on an emulated aarch64 machine: plan, doctor, bundle, cache and three blocks."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from packforcing.machine import total_memory
from tests.aarch64 import Unavailable, aarch64_python
from tests.helpers import frames_of

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
LARGEST_DIFFERENCE, MEAN_DIFFERENCE = 2, 0.001  # of 255: kernels add in another order
THREE_BLOCKS = "--seconds", 21 / 16, "--seed", 0  # of 5, 8 and 8 frames


@pytest.fixture(scope="module")
def aarch64():
    try:
        return aarch64_python()
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def package(dist, tmp_path_factory) -> Path:
    """The installed wheel."""
    folder = tmp_path_factory.mktemp("package")
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def run_command(aarch64, package, tmp_path):
    def run(*arguments) -> str:
        result = aarch64.run("-m", "packforcing.app.cli", *arguments, cwd=tmp_path, package=package)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture
def run_here(package, tmp_path):
    def run(*arguments) -> str:
        return subprocess.check_output(
            [sys.executable, "-m", "packforcing.app.cli", *map(str, arguments)],
            cwd=tmp_path, env={"PYTHONPATH": str(package)}, text=True,
        )  # fmt: skip

    return run


def test_doctor_finds_the_backend(run_command):
    machine = json.loads(run_command("doctor", "--json"))
    assert machine["system"].endswith(", aarch64")
    assert machine["memory_total"] == total_memory()
    capabilities = {entry["name"]: entry for entry in machine["capabilities"]}
    assert capabilities["run with onnxruntime"]["able"], capabilities
    assert not capabilities["run with tensorrt"]["able"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--gpu", "Orin Nano 8GB", "--vae", "taehv"),
        ("plan", "--gpu", "AGX Orin 64GB", "--fps", "16", "--unmeasured", "--json"),
        ("inspect",),
    ],
    ids=["plan", "plan for a rate", "inspect"],
)
def test_prints_what_this_machine_prints(run_command, run_here, arguments):
    assert run_command(*arguments) == run_here(*arguments)


def test_the_cache_keeps_its_promises(aarch64, package):
    """Hypothesis keeps files and objects to slow examples but in this profile."""
    options = "-p", "no:cacheprovider", "--hypothesis-profile=ci", "tests/runtime/test_cache.py"
    result = aarch64.run("-m", "pytest", *options, cwd=ROOT, package=package)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    assert re.search(r"^\d+ passed", result.stdout, re.MULTILINE), result.stdout


def test_three_blocks_look_like_those_of_this_machine(run_command, run_here, tmp_path):
    prompt = "a red star over navy stripes"
    run_command("render", prompt, *THREE_BLOCKS, "--out", "aarch64.mkv")
    run_here("render", prompt, *THREE_BLOCKS, "--out", "here.mkv")
    frames = frames_of(tmp_path / "aarch64.mkv").astype(int)
    difference = np.abs(frames - frames_of(tmp_path / "here.mkv"))
    print(f"of 255: at most {difference.max()}, {difference.mean():.5f} on average")
    assert len(frames) == 21 and frames.std() > 20
    assert difference.max() <= LARGEST_DIFFERENCE and difference.mean() <= MEAN_DIFFERENCE
