"""A job as a file: what is asked for, and the result once it has ended.

The server's jobs and those of `batch` are such files; their IDs differ in form.

    ID.json                     the record: request, then the result as well; sealed, versioned
    ID.mp4                      the video
    ID.mp4.render/              the unfinished render, which `packforcing.runtime.resume` describes
    ID.start                    the picture or clip that the video begins with, as uploaded
    ID.prompt-N.safetensors     the embedding of switch N, where prompts are embeddings

A job exists as long as its record does. The record is written last and removed first, so whatever
lies there without one is what a killed process left. Nothing in a record says that a job is being
rendered: it has no result yet, and the process that renders it knows.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from packforcing.config import Config, Policy
from packforcing.embeddings import SUFFIX, Embedding, load_embedding, save_embedding
from packforcing.errors import OutputError, ResumeError
from packforcing.files import (
    Upgrade,
    VersionError,
    decode_versioned,
    seal_json,
    unseal_json,
    write_file,
)
from packforcing.prompts import History, Switch, prompt_words
from packforcing.runtime.render_lock import delete, render_places
from packforcing.runtime.start_clip import Fit

VERSION = 1
UPGRADES: dict[int, Upgrade] = {}  # of older records
ID = re.compile(r"video_[0-9a-f]{24}")  # nanoseconds since 1970 and 8 random digits
_MAX_RECORD_BYTES = 1 << 24

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


@dataclass(frozen=True)
class Draft:
    """What is asked for, checked, before it is a job.

    Attributes:
        prompts: The schedule, words or embeddings.
        seconds: Length of the video.
        seed: Of the noise.
        policy: Which history blocks read; None: the session's.
        start: The picture or clip that the video begins with, as uploaded.
        start_fit: What becomes of a start of another shape.
        archive_limit: Blocks that the archive holds at most; None: all.
        remixed_from: The job that this one is a variation of.
    """

    prompts: list[Switch]
    seconds: float
    seed: int
    policy: Policy | None = None
    start: bytes | None = None
    start_fit: Fit = "fill"
    archive_limit: int | None = None
    remixed_from: str | None = None


class SwitchRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A `Switch` in a record."""

    time: float
    prompt: str  # its words; those of an embedding where it records them, or ""
    embedded: bool = False  # whether ID.prompt-N.safetensors is what the video follows
    history: History | None = None
    over: int = 1
    block: int | None = None


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How a job ended."""

    status: Literal["completed", "failed", "cancelled"]
    ended: float  # this and the next in seconds since 1970
    began: float | None = None  # in the process that ended it
    error: str = ""


class JobRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `ID.json` holds."""

    version: int = VERSION
    id: str
    created: float  # seconds since 1970
    model: str  # the bundle's name
    bundle: str  # SHA-256 of its manifest
    switches: tuple[SwitchRecord, ...]
    seconds: float
    frames: int
    seed: int
    policy: Policy
    start: bool  # whether there is an ID.start
    start_fit: Fit
    archive_limit: int | None
    remixed_from: str | None
    recorded: bool  # whether the video is a recording of a live one
    result: Result | None = None


def record_path(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}.json"


def video_path(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}.mp4"


def start_path(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}.start"


def prompt_path(folder: Path, job_id: str, number: int) -> Path:
    return folder / f"{job_id}.prompt-{number}{SUFFIX}"


def write_record(folder: Path, record: JobRecord) -> None:
    """Write a record atomically; it is on the disk when this returns.

    Raises:
        OutputError: The file cannot be written.
    """
    write_file(record_path(folder, record.id), seal_json("job", msgspec.json.encode(record)))


def read_record(path: Path) -> JobRecord:
    """Read a record.

    Raises:
        ResumeError: It is damaged, of another job or of another version.
    """
    remedy = "put the file back, or remove it, and the job is forgotten"
    try:
        if path.is_symlink() or path.stat().st_size > _MAX_RECORD_BYTES:
            raise ResumeError(f"{path} is no record of a job: {remedy}")
        body = unseal_json("job", path.read_bytes())
        record = decode_versioned(body, JobRecord, VERSION, UPGRADES, remedy)
    except VersionError as error:
        raise ResumeError(f"{path} {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged: {remedy}") from error
    if record.id != path.stem:
        raise ResumeError(f"{path} is the record of another job: {remedy}")
    return record


def write_switches(folder: Path, job_id: str, switches: list[Switch]) -> tuple[SwitchRecord, ...]:
    """Write the embeddings of a schedule beside its record, and return the schedule's records."""
    records = []
    for number, switch in enumerate(switches, 1):
        prompt = switch.prompt
        if not isinstance(prompt, str):
            rows = prompt if isinstance(prompt, Embedding) else Embedding(prompt, "", "", "")
            save_embedding(prompt_path(folder, job_id, number), rows)
        records.append(
            SwitchRecord(
                switch.time,
                prompt_words(prompt),
                not isinstance(prompt, str),
                switch.history,
                switch.over,
                switch.block,
            )
        )
    return tuple(records)


def read_switches(folder: Path, record: JobRecord) -> list[Switch]:
    """Return a job's schedule, its embeddings loaded.

    Raises:
        PromptError: An embedding is missing or damaged.
    """
    return [
        Switch(
            entry.time,
            load_embedding(prompt_path(folder, record.id, number))
            if entry.embedded
            else entry.prompt,
            entry.history,
            entry.over,
            entry.block,
        )
        for number, entry in enumerate(record.switches, 1)
    ]


def write_job(
    folder: Path,
    draft: Draft,
    job_id: str,
    *,
    config: Config,
    bundle: str,
    frames: int | None = None,
    result: Result | None = None,
) -> JobRecord:
    """Write a new job: what it needs first, then its record.

    Args:
        folder: Of the jobs.
        draft: Checked.
        job_id: A file name.
        config: Of the bundle, with the policy of jobs that name none.
        bundle: SHA-256 of its manifest.
        frames: Of the video, where it is a recording; None: those of the draft's seconds.
        result: Of a recording.

    Raises:
        OutputError: A file cannot be written.
    """
    if draft.start is not None:
        write_file(start_path(folder, job_id), draft.start)
    record = JobRecord(
        id=job_id,
        created=time.time(),
        model=config.name,
        bundle=bundle,
        switches=write_switches(folder, job_id, draft.prompts),
        seconds=draft.seconds,
        frames=config.frames(draft.seconds) if frames is None else frames,
        seed=draft.seed,
        policy=draft.policy or config.policy,
        start=draft.start is not None,
        start_fit=draft.start_fit,
        archive_limit=draft.archive_limit,
        remixed_from=draft.remixed_from,
        recorded=result is not None,
        result=result,
    )
    write_record(folder, record)
    return record


def read_draft(folder: Path, record: JobRecord) -> Draft:
    """Return what a job was made of.

    Raises:
        PromptError: The embedding of a prompt is missing or damaged.
        OutputError: The start is missing.
    """
    start = None
    if record.start:
        try:
            start = start_path(folder, record.id).read_bytes()
        except OSError as error:
            raise OutputError(f"the start of the video is missing: {error.strerror}") from error
    return Draft(
        prompts=read_switches(folder, record),
        seconds=record.seconds,
        seed=record.seed,
        policy=record.policy,
        start=start,
        start_fit=record.start_fit,
        archive_limit=record.archive_limit,
        remixed_from=record.remixed_from,
    )


def remove_files(folder: Path, job_id: str, *, keep_request: bool = False) -> None:
    """Remove a job's video and render, and unless it stays its request."""
    video = video_path(folder, job_id)
    remove_path(video)
    remove_path(render_places(video)[0])
    if not keep_request:
        for path in folder.glob(f"{job_id}.*"):
            remove_path(path)


def remove_path(path: Path) -> None:
    """Remove a file or folder, if there is one and the system lets it go."""
    with suppress(OSError):  # gone, or on Windows open in another program
        delete(path)
