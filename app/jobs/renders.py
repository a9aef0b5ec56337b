"""The jobs of a batch as work: each claimed by the lock of its render, its result a record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from packforcing.app.jobs.deal import Place, Render, Stop
from packforcing.app.jobs.events import Began, Ended, Event, Made
from packforcing.app.jobs.records import (
    JobRecord,
    Result,
    read_record,
    record_path,
    remove_files,
    write_record,
)
from packforcing.app.jobs.shares import Needs, Videos, worker_needs
from packforcing.errors import BackendError, BundleError, OutputError

if TYPE_CHECKING:
    from packforcing.runtime import BlockInfo, Session, Video

_FATAL = (BackendError, BundleError, OutputError)  # of the machine: other jobs would meet it too


@dataclass(frozen=True)
class Renders:
    """Renders of the jobs in a folder.

    Attributes:
        bundle: The bundle's folder.
        digest: SHA-256 of its manifest.
        folder: Of the jobs.
        backend: Runs the graphs.
        videos: What there is to render, for what it takes.
    """

    bundle: Path
    digest: str
    folder: Path
    backend: str = "onnxruntime"
    videos: tuple[Videos, ...] = ()

    @property
    def bundles(self) -> dict[Path, str]:
        """The one bundle."""
        return {self.bundle: self.digest}

    def needs(self, target: str | None = None) -> Needs:
        """Return what a worker takes, on a GPU of an architecture or on the CPU."""
        return worker_needs(self.videos, self.backend, target)

    @contextmanager
    def open(self, place: Place, stop: Stop) -> Iterator[Render]:
        """Open a session; yield what renders a job with it."""
        from packforcing.runtime import Session

        with Session.open(self.bundle, backend=self.backend, device=place.device) as session:
            stop.session = session
            yield lambda job_id, on_event: _render_job(session, self.folder, job_id, on_event, stop)

    def fail(self, job_id: str, error: str) -> Ended:
        """Write the failure of a job, unless it has a result."""
        record = read_record(record_path(self.folder, job_id))
        if record.result is None:
            record = _end_job(self.folder, record, error, 0.0)
        return _ended(record)


def _render_job(
    session: Session, folder: Path, job_id: str, on_event: Callable[[Event], None], stop: Stop
) -> None:
    from packforcing.app.jobs.execute import render_job

    record, began = read_record(record_path(folder, job_id)), 0.0

    @contextmanager
    def making(video: Video) -> Iterator[None]:
        nonlocal began
        began = time.time()
        on_event(Began(job_id, record.frames))
        if stop.requested:
            video.stop()
        yield

    def on_block(info: BlockInfo) -> None:
        on_event(Made(job_id, info.frames, info.recovered))

    if record.result is None:
        error = render_job(session, folder, record, making, on_block, _FATAL)
        record = read_record(record_path(folder, job_id))  # another worker may have ended it
        if record.result is None:
            record = _end_job(folder, record, error, began)
    on_event(_ended(record))


def _end_job(folder: Path, record: JobRecord, error: str | None, began: float) -> JobRecord:
    """Write the result of a job: completed, or why it failed."""
    result = Result(
        "completed" if error is None else "failed", time.time(), began or None, error or ""
    )
    ended = msgspec.structs.replace(record, result=result)
    write_record(folder, ended)
    if error is not None:
        remove_files(folder, record.id, keep_request=True)
    return ended


def _ended(record: JobRecord) -> Ended:
    assert record.result is not None
    return Ended(record.id, record.result.status, record.result.error)
