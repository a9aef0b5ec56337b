"""Batches on a Ray cluster: what does without Ray first, then actors on two nodes."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from filelock import FileLock

from packforcing.app.jobs import ray_actors
from packforcing.app.jobs.batch import add_job
from packforcing.app.jobs.deal import Place, Render, Stop, render_by
from packforcing.app.jobs.events import Began, Ended, Event
from packforcing.app.jobs.processes import ThisMachine
from packforcing.app.jobs.ray_actors import Actors, NodeCheck, Share, connect_cluster, shared_check
from packforcing.app.jobs.records import video_path
from packforcing.app.jobs.renders import Renders
from packforcing.app.jobs.shares import (
    Needs,
    Videos,
    check_per_gpu,
    cpu_share,
    gpu_part,
    worker_needs,
)
from packforcing.errors import BackendError, BundleError, OutputError
from packforcing.prompts import Switch
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.device import VisibleGpu
from packforcing.runtime.plan import CUDA_CONTEXT, make_plan
from packforcing.units import GIB
from tests.batches import RED, prepare, render_under_kills
from tests.helpers import assert_one_line, assert_refused, run, run_without


def command(folder: Path, *options: object) -> tuple[object, ...]:
    (folder / "jobs.txt").write_text(RED)
    return "batch", folder / "jobs.txt", "--out", folder / "out", *options


# What a worker takes


def test_a_worker_takes_the_plans_bytes(tmp_path):
    config, seconds = read_manifest(demo_bundle()).config, 20
    videos = [Videos(demo_bundle(), None, seconds), Videos(demo_bundle(), config.policy, 2)]
    plan = make_plan(config, "sm86", seconds=seconds)
    needs = worker_needs(videos, "onnxruntime-cuda", "sm86")
    assert needs.device == plan.total + CUDA_CONTEXT
    assert needs.host > sum(plan.host.values())
    if sys.platform == "linux":
        peak_bytes = peak_memory(*command(tmp_path, "--seconds", 2))
        assert 0 < peak_bytes < worker_needs(videos[1:], "onnxruntime", None).host


def peak_memory(*args: object) -> int:
    """Run a command; return its own peak resident bytes, not those of this process, which forks."""
    code = (
        "import atexit; from packforcing.app.cli import main; "
        "atexit.register(lambda: print(open('/proc/self/status').read())); main()"
    )
    line = [sys.executable, "-c", code, *map(str, args)]
    printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"VmHWM:\s*(\d+) kB", printed)[1]) << 10


@pytest.mark.parametrize("count", range(1, 65))
def test_as_many_fit_on_a_gpu_as_their_bytes_do(count):
    """Of the part that Ray is told, that many fit and no more."""
    assert count * gpu_part(count) <= 1 < (count + 1) * gpu_part(count)
    for device_bytes in (GIB, 5 * GIB + 1):
        check_per_gpu(count, device_bytes, VisibleGpu("a GPU", "sm89", count * device_bytes))
        if count > 1:
            with pytest.raises(BackendError, match=f"{count} workers of .* do not fit"):
                small = VisibleGpu("a GPU", "sm89", count * device_bytes - 1)
                check_per_gpu(count, device_bytes, small)


@pytest.mark.parametrize("cores", [[8], [8, 4], [2, 2, 2], [16, 1], [0, 3]])
def test_cores_are_divided_among_workers(cores):
    for workers in range(1, sum(cores) + 1):
        share = cpu_share(cores, workers)
        assert sum(each // share for each in cores) >= workers
        assert sum(each // (share + 1) for each in cores) < workers


@pytest.mark.parametrize(("memory_gib", "fits"), [(1, False), (2, True)])
def test_workers_whose_bytes_do_not_fit_are_never_on_one_gpu(
    tmp_path, monkeypatch, memory_gib, fits
):
    """The demo model takes 0.6 GiB with CUDA's context."""
    gpu = VisibleGpu("an emulated GPU", "sm89", memory_gib * GIB)
    monkeypatch.setattr("packforcing.runtime.backends.visible_gpus", lambda name: [gpu])
    if fits:
        videos = (Videos(demo_bundle(), None, 10),)
        work = Renders(demo_bundle(), "", tmp_path, "onnxruntime-cuda", videos)
        ThisMachine(2, [gpu]).check(work)
        return
    for option in "--workers", "--per-gpu":
        result = run(*command(tmp_path, "--backend", "onnxruntime-cuda", option, 2))
        assert_refused(result, "2 workers of", "an emulated GPU with 1.00 GiB", "1 on each GPU")
        assert not [*(tmp_path / "out").iterdir()]


# Refusals


def test_ray_that_is_missing_is_one_line(tmp_path):
    done = run_without("ray", *command(tmp_path, "--ray"))
    assert_one_line(
        done.returncode, done.stdout, done.stderr, r"needs ray, .*: pip install \".*\[ray\]\""
    )
    assert not (tmp_path / "out").exists()


def test_an_address_of_a_client_is_refused(tmp_path):
    assert_refused(run(*command(tmp_path, "--ray", "ray://head:10001")), "on a node of the cluster")


def test_a_node_without_the_files_is_refused(tmp_path):
    """What a node checks: the folder, its locks and the bundle."""
    token = tmp_path / ".ray-0.lock"
    check = NodeCheck(ray_actors.__version__, token, {demo_bundle(): "another"})
    with pytest.raises(OutputError, match=f"does not see the files .* {tmp_path}"):
        check.run()
    token.touch()
    with pytest.raises(OutputError, match="does not see locks"):
        check.run()
    with FileLock(token):
        with pytest.raises(BundleError, match=f"{demo_bundle()} is another bundle"):
            check.run()
        with pytest.raises(BackendError, match=f"has packforcing {ray_actors.__version__} and"):
            replace(check, version="0").run()


# On a cluster of two nodes, which run on this machine


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "num_gpus": 1, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token into the home
        patch.setenv("RAY_worker_niceness", "0")  # by default everything else goes first
        nodes = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=1, memory=4 * GIB)
            yield nodes
        finally:
            nodes.shutdown()


@pytest.mark.full
def test_two_hundred_jobs_while_workers_and_a_node_are_killed(cluster, tmp_path, undisturbed):
    """The demo model; the second kill is of a node, which comes back."""
    kills, count = random.Random(9), 0

    def kill() -> int:
        nonlocal count
        count += 1
        if count == 2:
            node = cluster.list_all_nodes()[-1]
            workers = actors_below(node)
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1, memory=4 * GIB)
            return len(workers)
        if workers := actors_below():
            with suppress(ProcessLookupError):
                os.kill(kills.choice(workers), signal.SIGKILL)
        return len(workers) > 0

    with connect_cluster(cluster.address, "onnxruntime", None, None) as executor:
        assert executor.size(200) == 2
        render_under_kills(executor, tmp_path / "out", kill, undisturbed)
    assert count > 2


def actors_below(node=None) -> list[int]:
    """Return the processes of actors, of one node or of all."""
    if node is not None:
        parents = [info.process.pid for info in node.all_processes["raylet"]]
    else:
        parents = [os.getpid()]
    children = [child for pid in parents for child in psutil.Process(pid).children(recursive=True)]
    pids = []
    for child in children:
        with suppress(psutil.Error):
            if "ray::_Actor" in " ".join(child.cmdline()):
                pids.append(child.pid)
    return pids


@pytest.mark.full
def test_mistakes_of_a_job_are_results_and_those_of_a_node_are_refused(cluster, tmp_path):
    work, jobs = prepare(tmp_path / "out", demo_bundle(), {"good": 1})
    wrong = replace(jobs[0], id="wrong", prompts=[Switch(0, "a fox")])
    add_job(work.folder, wrong, "new", read_manifest(demo_bundle()).config, work.digest)
    events: list[Event] = []
    with connect_cluster(cluster.address, "onnxruntime", 2, None) as executor:
        with pytest.raises(BackendError, match=r"Ray node .* is another bundle") as refusal:
            executor.check(replace(work, digest="another"))
        assert type(refusal.value.__cause__) is BundleError  # it came from the node
        executor.check(work)
        executor.render(work, ["wrong", "good"], lambda _, event: events.append(event), Stop())
    begun = [event.id for event in events if isinstance(event, Began)]
    ended = {event.id: event for event in events if isinstance(event, Ended)}
    assert len(begun) == len({*begun}) and {*ended} == {"wrong", "good"}
    assert ended["wrong"].status == "failed" and "fox" in ended["wrong"].error
    assert video_path(work.folder, "good").exists()


@pytest.mark.full
def test_the_command_is_stopped_resumably_and_resumes(cluster, tmp_path):
    arguments = command(tmp_path, "--seconds", 60, "--ray", cluster.address)
    line = [sys.executable, "-m", "packforcing.app.cli", *map(str, arguments)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        files = [name for _, _, names in os.walk(tmp_path / "out") for name in names]
        if any(name.startswith("segment") for name in files):
            break
        time.sleep(0.05)
    process.terminate()
    stderr = process.communicate()[1]
    assert process.returncode == 143
    assert "1 of 1 jobs are left: the same command resumes them" in stderr
    result = run(*arguments)
    assert result.exit_code == 0 and "1 unfinished" in result.stderr
    with Session.open(demo_bundle()) as session:
        session.render(RED, 60, tmp_path / "alone.mp4", 0)
    (video,) = (tmp_path / "out").glob("*.mp4")
    assert video.read_bytes() == (tmp_path / "alone.mp4").read_bytes()


@dataclass(frozen=True)
class Placed:
    """Work that shows whether two workers are there at once."""

    folder: Path
    together: bool
    bundles: ClassVar[dict[Path, str]] = {}

    def needs(self, target: str | None = None) -> Needs:
        return Needs(0, 0)

    @contextmanager
    def open(self, place: Place, stop: Stop) -> Iterator[Render]:
        def render(job_id: str, on_event: Callable[[Event], None]) -> None:
            (self.folder / f"{os.getpid()}.worker").touch()
            deadline = time.monotonic() + 120
            while self.together and len([*self.folder.glob("*.worker")]) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            on_event(Ended(job_id, "completed"))

        if self.together:
            yield render
        else:
            with FileLock(self.folder / "gpu.lock", timeout=0):  # fails in a second worker
                yield render

    def fail(self, job_id: str, error: str) -> Ended:
        raise AssertionError(error)


@pytest.mark.full
@pytest.mark.parametrize("per_gpu", [1, 2])
def test_only_workers_that_fit_are_placed_on_a_gpu(cluster, tmp_path, per_gpu):
    """The cluster has one GPU; each of two workers takes the part that `per_gpu` of them have."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    events: list[Event] = []
    work = Placed(tmp_path, together=per_gpu == 2)
    with (
        connect_cluster(cluster.address, "onnxruntime-cuda", None, None),
        shared_check(work) as check,
    ):
        team = Actors(ray, work, 2, Share(0, gpu_part(per_gpu), 0), check)
        ids = [str(number) for number in range(10)]
        render_by(team, work, ids, lambda _, event: events.append(event), Stop())
    assert {event.id for event in events} == {*ids}
    assert len([*tmp_path.glob("*.worker")]) == per_gpu
