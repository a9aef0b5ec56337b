"""A batch in its folder: what is done, what is to be rendered and why, and the list of results."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from packforcing.app.jobs.batch_file import BatchJob
from packforcing.app.jobs.records import (
    Draft,
    JobRecord,
    prompt_path,
    read_record,
    record_path,
    remove_files,
    start_path,
    video_path,
    write_job,
)
from packforcing.config import Config
from packforcing.embeddings import Embedding, load_embedding
from packforcing.errors import OutputError, PackForcingError, RenderLocked
from packforcing.files import write_file
from packforcing.prompts import prompt_words
from packforcing.runtime.render_lock import locked_folder
from packforcing.runtime.render_record import RECORD
from packforcing.runtime.resume import discard

RESULTS = "results.jsonl"


def find_work(
    folder: Path,
    jobs: Iterable[BatchJob],
    config: Config,
    bundle: str,
    *,
    retry_failed: bool,
    encoding: bool,
) -> dict[str, str]:
    """Tell which jobs have no result that stands, and why.

    Args:
        folder: Of the records and videos.
        jobs: Those to look at.
        config: Of the bundle.
        bundle: SHA-256 of its manifest.
        retry_failed: Whether a failure does not stand.
        encoding: Whether words become embeddings before they are rendered.

    Returns:
        The reason by ID: "new", "unfinished", "failed before", "its video is missing", or what has
        changed.

    Raises:
        OutputError: A file in the folder is not of a batch.
        ResumeError: A record is damaged.
    """
    reasons = {}
    for job in jobs:
        path, video = record_path(folder, job.id), video_path(folder, job.id)
        if not path.exists():
            if video.exists():
                raise OutputError(
                    f"{video} is no result of a batch: move it, or choose another --out or id"
                )
            reasons[job.id] = "new"
            continue
        record = read_record(path)
        if changes := _changes(folder, record, job, config, bundle, encoding):
            reasons[job.id] = f"changed: {', '.join(changes)}"
        elif record.result is None:
            reasons[job.id] = "unfinished"
        elif record.result.status != "completed":
            if retry_failed:
                reasons[job.id] = "failed before"
        elif not video.exists():
            reasons[job.id] = "its video is missing"
    return reasons


def add_job(folder: Path, job: BatchJob, reason: str, config: Config, bundle: str) -> None:
    """Write the record of a job, unless it is there, from before or by another run.

    Args:
        folder: Of the records.
        job: Its words are encoded, where the model needs it.
        reason: One that `find_work` states.
        config: Of the bundle.
        bundle: SHA-256 of its manifest.

    Raises:
        RenderLocked: Another process renders what the job was before.
        OutputError: A file cannot be read or written.
    """
    if reason == "unfinished":
        return
    if reason != "new":
        discard(video_path(folder, job.id))
        remove_files(folder, job.id)
    with suppress(RenderLocked), locked_folder(video_path(folder, job.id)) as locked:
        if not record_path(folder, job.id).exists():
            _write_job(folder, job, config, bundle)
        if not (locked.path / RECORD).exists():  # nothing to resume
            locked.remove()


def _write_job(folder: Path, job: BatchJob, config: Config, bundle: str) -> None:
    start = None
    if job.start is not None:
        try:
            start = job.start.read_bytes()
        except OSError as error:
            raise OutputError(f"cannot read {job.start}: {error.strerror}") from error
    draft = Draft(job.prompts, job.seconds, job.seed, job.policy, start)
    write_job(folder, draft, job.id, config=config, bundle=bundle)


def read_records(folder: Path, jobs: Iterable[BatchJob]) -> dict[str, JobRecord]:
    """Return the records of jobs that have one, by ID."""
    paths = {job.id: record_path(folder, job.id) for job in jobs}
    return {job_id: read_record(path) for job_id, path in paths.items() if path.exists()}


def write_results(folder: Path, records: Iterable[JobRecord]) -> None:
    """Write a line for each job that has ended, in the order of the batch.

    Raises:
        OutputError: The disk refuses it.
    """
    lines = []
    for record in records:
        if (result := record.result) is not None:
            done = result.status == "completed"
            lines.append(
                msgspec.json.encode(
                    {
                        "id": record.id,
                        "status": result.status,
                        "video": video_path(folder, record.id).name if done else None,
                        "error": result.error or None,
                        "prompt": record.switches[0].prompt,
                        "seconds": record.seconds,
                        "frames": record.frames,
                        "seed": record.seed,
                        "ended": _iso_time(result.ended),
                    }
                )
            )
    write_file(folder / RESULTS, b"".join(line + b"\n" for line in lines))


def share_of(jobs: Sequence[BatchJob], shard: tuple[int, int]) -> Sequence[BatchJob]:
    """Return the jobs of shard I of N, counted from 1: every N-th one."""
    number, count = shard
    return jobs[number - 1 :: count]


def _changes(
    folder: Path, record: JobRecord, job: BatchJob, config: Config, bundle: str, encoding: bool
) -> list[str]:
    """Name what a record has otherwise than a job."""
    before = {
        "bundle": record.bundle,
        "seconds": record.seconds,
        "seed": record.seed,
        "policy": record.policy,
        "prompt": [
            (switch.time, switch.prompt, switch.embedded, switch.history, switch.over)
            for switch in record.switches
        ],
        "start": record.start and _digest(start_path(folder, record.id)),
    }
    now = {
        "bundle": bundle,
        "seconds": job.seconds,
        "seed": job.seed,
        "policy": job.policy or config.policy,
        "prompt": [
            (
                switch.time,
                prompt_words(switch.prompt),
                encoding or not isinstance(switch.prompt, str),
                switch.history,
                switch.over,
            )
            for switch in job.prompts
        ],
        "start": job.start is not None and _digest(job.start),
    }
    changes = [name for name in before if before[name] != now[name]]
    if "prompt" not in changes and not _same_embeddings(folder, job):
        changes.append("prompt")
    return changes


def _same_embeddings(folder: Path, job: BatchJob) -> bool:
    for number, switch in enumerate(job.prompts, 1):
        if isinstance(switch.prompt, Embedding):
            try:
                before = load_embedding(prompt_path(folder, job.id, number))
            except PackForcingError:
                return False
            if not np.array_equal(before.text, switch.prompt.text):
                return False
    return True


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "missing"


def _iso_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
