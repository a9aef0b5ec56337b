"""GPUs that share the host's memory (Jetson, DGX Spark): counted once, used in place."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from packforcing import model_config
from packforcing.errors import BackendError
from packforcing.prompts import Switch
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.allocations import allocations
from tests.emulated import SCRATCH, Cuda, TensorRT, build_engines, cuda_device, gpu_session

GIB = 1 << 30
TOTAL = 8 * GIB
DEMO = model_config("demo")
SCHEDULE = [
    Switch(0, "a red star over navy stripes"),
    Switch(5, "a white circle over sand dots", "recompute"),
    Switch(6, "a green square over sand checks", "cut"),
]


def free_host_memory(monkeypatch, free_bytes):
    """Let the system say that this much of 8 GiB is available, cached files included."""
    memory = SimpleNamespace(total=TOTAL, available=free_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.fixture
def cuda():
    """A GPU like GB10, whose memory is full of the files just downloaded."""
    return Cuda(TOTAL, target=(12, 1), integrated=True, cached=TOTAL - (64 << 20))


def test_a_video_is_the_same_and_nothing_is_copied_between_host_and_gpu(cuda):
    with Session.open(demo_bundle(), threads=1) as host:
        expected = np.concatenate(list(host.stream(SCHEDULE, 7)))
        session = gpu_session(host, cuda)
        frames = np.concatenate(list(session.stream(SCHEDULE, 7)))
    np.testing.assert_array_equal(frames, expected)
    sizes = [entry[3] for entry in cuda.log if entry[0] == "copy"]
    (block,) = (array for array in allocations(DEMO) if array.name == "staging.block")
    (compressed,) = (array for array in allocations(DEMO) if array.name == "staging.compressed")
    # into the context, on the GPU: blocks when they are committed, and mid blocks when selected
    assert {*sizes} == {block.nbytes, compressed.nbytes}


def test_no_array_is_there_twice(cuda, monkeypatch, tmp_path):
    """Engines, their scratch and every array of a rollout once, to the byte."""
    free_host_memory(monkeypatch, GIB)
    bundle = shutil.copytree(demo_bundle(), tmp_path / "bundle")
    build_engines(bundle, targets=("sm121",))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", TensorRT(cuda))
    monkeypatch.setattr("packforcing.runtime.device._cuda_runtime", lambda extra: cuda)
    with Session.open(bundle, backend="tensorrt-rtx") as session:
        next(session.stream(SCHEDULE[:1], 3))
        planned = sum(array.nbytes for array in allocations(DEMO) if array.place == "device")
        assert cuda.used("device") + cuda.used("host") == planned + SCRATCH


def test_cached_files_count_as_free_memory(cuda, monkeypatch):
    device = cuda_device(cuda)
    assert cuda.cudaMemGetInfo()[1] == 64 << 20  # what CUDA calls free
    free_host_memory(monkeypatch, 6 * GIB)
    assert device.free_memory() == (6 * GIB, TOTAL)
    device.require(5 * GIB, "the model")


def test_memory_that_programs_fill_is_refused_with_its_figures(cuda, monkeypatch):
    device = cuda_device(cuda)
    free_host_memory(monkeypatch, GIB // 2)
    message = r"needs 4\.00 GiB .* has 0\.50 of 8\.00 GiB free, which it shares with the system"
    with pytest.raises(BackendError, match=message):
        device.require(4 * GIB, "the model")


def test_a_discrete_gpu_is_asked_for_its_own_memory(monkeypatch):
    device = cuda_device(Cuda(2 * GIB))
    free_host_memory(monkeypatch, 6 * GIB)
    assert not device.integrated and device.free_memory() == (2 * GIB, 2 * GIB)
