"""Time what dealing jobs out takes: workers claim a job, write its result and render nothing.

    python -m benchmarks.bench_batch --jobs 2000 --workers 16

Once by processes of this machine, once by actors of a Ray cluster of one node with as many GPUs as
workers, which exist for Ray alone. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from packforcing.app.jobs.batch import add_job
from packforcing.app.jobs.batch_file import BatchJob
from packforcing.app.jobs.deal import Place, Render, Stop, Team, render_by
from packforcing.app.jobs.events import Ended, Event
from packforcing.app.jobs.processes import Processes
from packforcing.app.jobs.ray_actors import Actors, Share, connect_cluster, shared_check
from packforcing.app.jobs.records import video_path
from packforcing.app.jobs.renders import Renders
from packforcing.prompts import Switch
from packforcing.runtime import demo_bundle
from packforcing.runtime.bundle import bundle_digest, read_manifest
from packforcing.runtime.render_lock import locked_folder


@dataclass(frozen=True)
class Claims(Renders):
    """Jobs that are claimed and ended."""

    @contextmanager
    def open(self, place: Place, stop: Stop) -> Iterator[Render]:
        """Open nothing."""

        def render(job_id: str, on_event: Callable[[Event], None]) -> None:
            with locked_folder(video_path(self.folder, job_id)) as locked:
                on_event(self.fail(job_id, "nothing was rendered"))
                locked.remove()

        yield render


def write_jobs(folder: Path, count: int) -> tuple[Claims, list[str]]:
    """Write the records of jobs into a new folder."""
    folder.mkdir()
    manifest = read_manifest(demo_bundle())
    digest = bundle_digest(manifest)
    ids = [f"job-{number}" for number in range(count)]
    for job_id in ids:
        job = BatchJob(job_id, [Switch(0, "a red star")], 1, 0, None, None)
        add_job(folder, job, "new", manifest.config, digest)
    return Claims(demo_bundle(), digest, folder), ids


def measure(name: str, team: Team, work: Claims, ids: list[str]) -> None:
    """Run all jobs, and print what one takes between the first result and the last."""
    ends: list[float] = []
    before = psutil.Process().memory_info().rss
    began, began_cpu = time.perf_counter(), 0.0

    def note(number: int, event: Event) -> None:
        nonlocal began_cpu
        if isinstance(event, Ended):
            began_cpu = began_cpu or time.process_time()
            ends.append(time.perf_counter())

    render_by(team, work, ids, note, Stop())
    assert len(ends) == len(ids)
    seconds, cpu_seconds = ends[-1] - ends[0], time.process_time() - began_cpu
    grown_bytes = psutil.Process().memory_info().rss - before
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(
        f"{name}: {len(ids)} jobs by {team.size} workers, first after {ends[0] - began:.1f} s, "
        f"then {len(ids) / seconds:.0f} a second; driver: {1000 * cpu_seconds / len(ids):.2f} ms "
        f"of CPU each, {peak_bytes / 1e6:.0f} MB at most, grown by {grown_bytes / 1e6:.1f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=16)
    options = parser.parse_args()
    # No token in the home, and the priority that processes have. Ray reads the names as they are.
    os.environ.update({"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"})
    import ray
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work, ids = write_jobs(folder / "processes", options.jobs)
        measure("processes", Processes(work, [Place()] * options.workers), work, ids)

        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": options.workers,
                "num_gpus": options.workers,
                "include_dashboard": False,
            },
        )
        try:
            work, ids = write_jobs(folder / "actors", options.jobs)
            with (
                connect_cluster(cluster.address, "onnxruntime-cuda", None, None),
                shared_check(work) as check,
            ):
                team = Actors(ray, work, options.workers, Share(1, 1, 0), check)
                measure("Ray actors", team, work, ids)
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main()
