"""Batches that several test modules render: the jobs as the command writes them, and the truth."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from packforcing.app.jobs.batch import add_job
from packforcing.app.jobs.batch_file import BatchFile, BatchJob
from packforcing.app.jobs.deal import Executor, Stop
from packforcing.app.jobs.events import Began, Event, Made
from packforcing.app.jobs.renders import Renders
from packforcing.app.jobs.shares import Videos
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bundle import bundle_digest, read_manifest

RED, BLUE = "a red star over navy stripes", "a blue circle over sand dots"


def prepare(
    folder: Path, bundle: Path, seconds_by_id: Mapping[str, float]
) -> tuple[Renders, list[BatchJob]]:
    """Write jobs as the command does; the prompt and the seed differ."""
    manifest, path = read_manifest(bundle), folder.parent / f"{folder.name}.jsonl"
    rows = [
        {"id": name, "prompt": (RED, BLUE)[number % 2], "seed": number, "seconds": seconds}
        for number, (name, seconds) in enumerate(seconds_by_id.items())
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    file = BatchFile(
        path, manifest.config, {},
        seconds=1, seed=0, policy=None, encoding=False, one_policy=False,
    )  # fmt: skip
    folder.mkdir()
    digest = bundle_digest(manifest)
    for job in file.jobs:
        add_job(folder, job, "new", manifest.config, digest)
    videos = (Videos(bundle, None, max(seconds_by_id.values())),)
    return Renders(bundle, digest, folder, videos=videos), file.jobs


def render_alone(bundle: Path, jobs: list[BatchJob], folder: Path) -> dict[str, bytes]:
    """Render jobs without any of this; return the bytes by ID."""
    folder.mkdir()
    with Session.open(bundle) as session:
        for job in jobs:
            session.render(job.prompts, job.seconds, folder / f"{job.id}.mp4", job.seed)
    return {path.stem: path.read_bytes() for path in folder.glob("*.mp4")}


MANY = {f"job-{number:03}": 1.0 for number in range(200)}


def render_under_kills(
    executor: Executor, folder: Path, kill: Callable[[], int], undisturbed: Mapping[str, bytes]
) -> None:
    """Render `MANY` jobs of the demo model; all are there, the same, and none is made twice.

    Args:
        executor: Renders them.
        folder: Of the results.
        kill: Kills something, each time after 5 to 25 blocks; returns how many workers that ended.
        undisturbed: The videos, by ID.
    """
    work, jobs = prepare(folder, demo_bundle(), MANY)
    begun: Counter[str] = Counter()
    moments, killed, blocks = random.Random(7), list[int](), 5

    def note(worker: int, event: Event) -> None:
        nonlocal blocks
        if isinstance(event, Began):
            begun[event.id] += 1
        elif isinstance(event, Made):
            blocks -= 1
            if blocks == 0:
                blocks = moments.randint(5, 25)
                killed.append(kill())

    began = time.monotonic()
    executor.render(work, [job.id for job in jobs], note, Stop())
    print(
        f"{len(jobs)} jobs in {time.monotonic() - began:.0f} s, {sum(killed)} workers ended by "
        f"{len(killed)} kills, {begun.total() - len(begun)} jobs resumed or begun again"
    )
    assert {path.stem: path.read_bytes() for path in folder.glob("*.mp4")} == undisturbed
    assert {*begun} <= {*MANY} and 0 < begun.total() - len(begun) <= sum(killed)
    assert [*folder.glob("*.render")] == [*folder.glob(".ray*")] == []
