"""GPUs that share the host's memory (Jetson, DGX Spark): counted once, used in place."""

import json
import shutil
import sys
from types import SimpleNamespace

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing import model_config
from packforcing.config import Policy, Precision
from packforcing.errors import BackendError, PlanError
from packforcing.prompts import Switch
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.allocations import allocations, archive_bytes, snapshot_bytes
from packforcing.runtime.bundle import GPU_GRAPHS
from packforcing.runtime.estimate import scratch_bytes, weight_bytes
from packforcing.runtime.gpus import known_gpus
from packforcing.runtime.nvml import UNIFIED_TARGETS
from packforcing.runtime.plan import (
    CUDA_CONTEXT,
    RESERVE,
    SYSTEM,
    TARGETS,
    choose_plan,
    further_video,
    make_plan,
    memory_budget,
    stream,
)
from tests.emulated import SCRATCH, Cuda, TensorRT, build_engines, cuda_device, gpu_session
from tests.helpers import WAN, run

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


policies = st.builds(
    Policy, sink=st.integers(1, 2), mid=st.integers(0, 6), recent=st.integers(1, 2)
)
precisions = st.sampled_from(
    [("fp16", "fp16", "fp16"), ("fp16", "fp16", "int8"), ("fp16", "int4", "int8")]
)


@settings(deadline=None, max_examples=30)
@given(policies, precisions, st.sampled_from(UNIFIED_TARGETS), st.floats(1, 600))
def test_one_memory_is_planned_with_everything_once(policy, formats, target, seconds):
    """Every array wherever it is, weights, scratch, archive and checkpoint, and nothing twice."""
    precision = Precision(**dict(zip(("compute", "weights", "cache"), formats, strict=True)))
    config = msgspec.structs.replace(WAN, policy=policy, precision=precision)
    plan, weights = make_plan(config, target, seconds=seconds), weight_bytes(config)
    blocks = config.blocks(config.frames(seconds))
    assert plan.total == sum(
        (
            sum(array.nbytes for array in allocations(config)),
            sum(weights[graph] for graph in (*GPU_GRAPHS, "prompt", "vae_encoder")),
            max(scratch_bytes(config).values()),
            archive_bytes(config, blocks),
            snapshot_bytes(config),
            RESERVE,
        )
    )
    discrete = make_plan(config, "sm120", seconds=seconds)
    copies = sum(a.nbytes for a in allocations(config) if a.host_view and a.place == "device")
    both = sum(discrete.device.values()) + sum(discrete.host.values())
    assert both - plan.total == copies > 0
    assert plan.at_start == plan.total - plan.host["archive"] - plan.host["checkpoint"]
    assert discrete.at_start == discrete.total == sum(discrete.device.values())


def test_a_session_takes_what_the_plan_of_one_memory_says(cuda, monkeypatch):
    """To the byte, on both sides: all rows but weights, scratch and what comes with the video."""
    free_host_memory(monkeypatch, GIB)
    with Session.open(demo_bundle(), threads=1) as host:
        session = gpu_session(host, cuda)
        next(session.stream(SCHEDULE[:1], 3))
        device = session.backend.device
        plan = make_plan(DEMO, "sm121")
        rows = {**plan.device, "copies": plan.host["copies"]}
        buffers = [
            size for name, size in rows.items() if not name.startswith(("weights", "scr", "res"))
        ]
        assert device.allocated.total() + device.host.allocated.total() == sum(buffers)


@pytest.mark.parametrize("target", UNIFIED_TARGETS)
def test_weights_are_not_streamed_within_one_memory(target):
    plan = make_plan(WAN, target)
    assert stream(plan, plan.total - (64 << 20)) == plan
    assert stream(make_plan(WAN, "sm86"), make_plan(WAN, "sm86").total - (64 << 20)).streamed


def test_a_longer_video_takes_more_of_one_memory():
    """The archive is in it, so what fits for a minute may not for an hour."""
    budget = memory_budget(8 * GIB, "sm87")
    minute = choose_plan(WAN, "sm87", budget)
    assert minute.total <= budget < make_plan(minute.config, "sm87", seconds=3600).total
    with pytest.raises(PlanError, match=r"does not fit into 6\.11 GiB on sm87"):
        choose_plan(WAN, "sm87", budget, seconds=3600)


def test_the_budget_of_a_module_leaves_room_for_the_system():
    assert memory_budget(8 * GIB, "sm87") == 8 * GIB - CUDA_CONTEXT - SYSTEM
    assert memory_budget(8 * GIB, "sm89") == 8 * GIB - CUDA_CONTEXT
    for gpu in known_gpus().values():
        shared = gpu.name.startswith(("Jetson", "DGX"))
        assert shared == (gpu.target in UNIFIED_TARGETS) and gpu.target in TARGETS


def test_a_further_video_has_its_own_archive_in_one_memory():
    shared, discrete = make_plan(WAN, "sm121"), make_plan(WAN, "sm120")
    own = sum(shared.host[name] for name in ("copies", "archive", "checkpoint"))
    assert further_video(shared) == further_video(discrete) + own


def test_the_command_shows_one_memory():
    out = run("plan", "--gpu", "AGX Orin 64GB").stdout
    plan = choose_plan(WAN, "sm87", memory_budget(64 * GIB, "sm87"), any_autoencoder=True)
    pool = out.partition("memory of both")[2].partition("engines, and scratch")[0]
    on_gpu, beside, total, budget = (
        int(line.rsplit(maxsplit=2)[1].replace(",", "")) for line in pool.splitlines()[1:5]
    )
    assert on_gpu + beside == total == plan.total < budget == memory_budget(64 * GIB, "sm87")
    assert "to build on the device, one at a time (prediction)" in out
    shown = json.loads(run("plan", "--gpu", "AGX Orin 64GB", "--json").stdout)["plans"][0]
    assert shown["shared_memory"] and shown["total"] == total
    assert (
        "of GPU and host together on sm87"
        in run("plan", "--budget", "8,12", "--target", "sm86,sm87").stdout
    )
