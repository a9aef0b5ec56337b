"""A benchmark counts what the estimate says that a block does, and measures what the plan says.

On the CPU, and with engines on the emulated GPU. Times are not looked at, except where a clock is
made that knows them.
"""

import json
import shutil
import sys
from itertools import count

import numpy as np
import pytest

from packforcing import Policy, model_config
from packforcing.geometry import operations
from packforcing.runtime import Session, bench, demo_bundle
from packforcing.runtime.estimate import calls_per_block, seconds_per_block
from packforcing.runtime.gpus import find_gpu
from tests.emulated import Cuda, TensorRT, build_engines, gpu_session
from tests.helpers import TINY, run

RATE = 1e9  # operations per second of a CPU that is made up


@pytest.fixture(autouse=True)
def _known_rate(monkeypatch):
    monkeypatch.setattr(bench, "matrix_rate", lambda threads: RATE)


def measure(bundle, **options):
    return bench.run_benchmark(bundle, lambda: Session.open(bundle, threads=1, **options), blocks=3)


def test_calls_buffers_and_the_roof_of_a_cpu(tiny_bundle):
    result = measure(tiny_bundle)
    assert {name: call.times for name, call in result.calls.items()} == calls_per_block(TINY)
    work = operations(TINY)
    assert {name: call.operations for name, call in result.calls.items()} == work
    total = sum(work[name] * times for name, times in calls_per_block(TINY).items())
    assert result.roof is not None
    assert result.roof.milliseconds == pytest.approx(1e3 * total / RATE)
    buffers, process = result.memory
    assert buffers.planned == buffers.peak and process.planned is None
    assert (result.warm_up, result.blocks) == (TINY.policy.capacity + 2, 3)
    assert result.making.low <= result.making.median <= result.making.high
    assert result.real_time == result.fps.median / TINY.fps


def test_a_commit_by_the_last_step_is_one_call_less(tiny_bundle):
    policy = Policy(sink=1, mid=1, recent=1, commit="last-step")
    calls = measure(tiny_bundle, policy=policy).calls
    assert calls["denoiser.block"].times == len(TINY.timesteps)


def test_a_policy_that_reads_every_block_is_timed_before_its_context_is_full(tiny_bundle):
    result = measure(tiny_bundle, policy=Policy(sink=0, mid=0, recent=1_000_000))
    assert result.warm_up == 2
    assert any("full context" in part for part in result.not_measured)
    assert "compressor" not in result.calls


def test_engines_on_an_emulated_gpu(tmp_path, monkeypatch):
    library, bundle = TensorRT(Cuda()), tmp_path / "bundle"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr("packforcing.runtime.device._cuda_runtime", lambda extra: library.cuda)
    gpu = find_gpu("RTX 4060")
    monkeypatch.setattr(bench, "find_gpu", {"NVIDIA Nothing": gpu}.get)
    shutil.copytree(demo_bundle(), bundle)
    build_engines(bundle)
    result = measure(bundle, backend="tensorrt-rtx")
    demo = model_config("demo")
    assert {name: call.times for name, call in result.calls.items()} == calls_per_block(demo)
    runtime, everyone, _ = result.memory
    assert runtime.planned == runtime.peak == everyone.peak
    assert result.roof is not None
    assert result.roof.milliseconds == pytest.approx(1e3 * seconds_per_block(demo, gpu))


def test_a_gpu_without_figures_has_no_roof(tiny_bundle):
    result = bench.run_benchmark(
        tiny_bundle, lambda: gpu_session(Session.open(tiny_bundle, threads=1)), blocks=2
    )
    assert result.roof is None
    assert any("no figures for a GPU 'NVIDIA Nothing'" in part for part in result.not_measured)


def test_quartiles_are_of_the_counted_blocks_alone(tiny_bundle, monkeypatch):
    """Under a clock that ticks once each time it is read, every block takes one tick, and so does
    its encoding, however long the warm-up was."""
    ticks = count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    result = measure(tiny_bundle)
    assert result.encoding == bench.Spread(1e3, 1e3, 1e3)


def test_the_rate_of_a_cpu_is_that_of_a_matrix_product(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < bench.matrix_rate(1) < 1e13


def test_the_command_prints_what_the_json_has(tiny_bundle):
    command = "bench", tiny_bundle, "--blocks", 2, "--threads", 1
    result = run(*command, "--json")
    assert result.exit_code == 0, result.stderr
    fields = json.loads(result.stdout)
    assert fields["blocks"] == 2 and fields["versions"]["numpy"] == np.__version__
    printed = run(*command)
    assert printed.exit_code == 0, printed.stderr
    for name in (*fields["calls"], "first frame", "buffers", "roofline", "not measured: "):
        assert name in printed.stdout
