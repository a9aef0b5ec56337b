"""A folder of jobs: add, look up, list, cancel and delete them, and hand them to a worker in turn.

One process at a time has a folder, by a lock. All records are in memory as well; every method may
be called from every thread. `packforcing.app.jobs.records` has the layout.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import msgspec

from packforcing.app.jobs.records import (
    ID,
    Draft,
    JobRecord,
    Result,
    Status,
    read_record,
    record_path,
    remove_files,
    remove_path,
    video_path,
    write_job,
    write_record,
)
from packforcing.config import Config
from packforcing.errors import ConfigError, OutputError
from packforcing.files import flush_folder
from packforcing.runtime.bundle import Manifest, bundle_digest
from packforcing.runtime.video import Video

_log = logging.getLogger(__name__)
_LOCK = "server.lock"
# names of this store's files; nothing else in the folder is ever touched
_OWN_FILES = re.compile(rf"\.?({ID.pattern})\..+")


@dataclass
class Running:
    """The job that is being rendered.

    Attributes:
        id: Of the job.
        began: Seconds since 1970.
        frames: Made so far.
        video: Makes them; None until it has begun.
    """

    id: str
    began: float = field(default_factory=time.time)
    frames: int = 0
    video: Video | None = None


@dataclass(frozen=True)
class Job:
    """A job as it is now.

    Attributes:
        record: Its file.
        status: Follows from its result and from what is being rendered.
        frames: Made so far.
        began: When rendering began, in seconds since 1970; None before.
        position: How many jobs are rendered before it; None unless it is queued.
        video: Where the video is, once the job is completed.
    """

    record: JobRecord
    status: Status
    frames: int
    began: float | None
    position: int | None
    video: Path


class Store:
    """The jobs of a folder; use it as a context manager.

    Attributes:
        folder: The folder.
    """

    def __init__(self, folder: Path, manifest: Manifest, config: Config) -> None:
        """Lock a folder, read its records and remove what a killed process left.

        Args:
            folder: Made where there is none.
            manifest: Of the bundle that renders.
            config: The manifest's, with the policy of jobs that name none.

        Raises:
            OutputError: The folder cannot be written, or another process has it.
            ResumeError: A record is damaged.
            ConfigError: Jobs of another bundle wait in it.
        """
        from filelock import FileLock, Timeout

        self.folder = folder
        self._config = config
        self._bundle = bundle_digest(manifest)
        self._changed = threading.Condition()
        self._records: dict[str, JobRecord] = {}  # by ID, which is in order of creation
        self._queue: dict[str, None] = {}  # IDs of jobs without a result, in order
        self._running: Running | None = None
        self._closed, self._latest = False, 0  # nanoseconds in the latest ID
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder / _LOCK)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"another server has the folder {folder}: stop it, or choose another --out"
            ) from error
        except OSError as error:
            raise OutputError(f"cannot use the folder {folder}: {error.strerror}") from error
        try:
            self._read()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        self._lock.release()

    def close(self) -> None:
        """Stop the job that is being rendered, and hand out no other; it stays queued."""
        with self._changed:
            self._closed = True
            self._stop_running()
            self._changed.notify_all()

    @property
    def queued(self) -> int:
        """Jobs without a result, the one that is being rendered included."""
        return len(self._queue)

    def spare_path(self, suffix: str) -> Path:
        """Return a name in the folder for a file in the making; swept with what a kill leaves."""
        return self.folder / f"{self._new_id()}{suffix}"

    def add(self, draft: Draft) -> Job:
        """Queue a job; it is on the disk when this returns.

        Args:
            draft: Checked.

        Raises:
            OutputError: The disk refuses it.
        """
        return self._add(draft, self._new_id(), None, None)

    def add_recording(self, draft: Draft, video: Path, frames: int) -> Job:
        """Add a completed job, whose video was recorded live.

        Args:
            draft: Renders the live video from its beginning.
            video: The recording, on the disk of the folder; moved.
            frames: Of the recording.

        Raises:
            OutputError: The disk refuses it.
        """
        job_id, now = self._new_id(), time.time()
        try:
            os.replace(video, video_path(self.folder, job_id))
        except OSError as error:
            raise OutputError(f"cannot keep the recording: {error.strerror}") from error
        return self._add(draft, job_id, frames, Result("completed", now, now))

    def get(self, job_id: str) -> Job | None:
        """Return a job, or None where there is none of this ID."""
        with self._changed:
            record = self._records.get(job_id)
            return self._job(record, self._positions()) if record else None

    def list(self, limit: int, after: str | None = None, *, newest_first: bool = True) -> list[Job]:
        """Return jobs in order of creation.

        Args:
            limit: Jobs at most.
            after: Begin with the one after this one, which may be gone.
            newest_first: The order.
        """
        with self._changed:
            ids = [*self._records]
            if newest_first:
                ids.reverse()
            if after is not None:
                ids = [
                    job_id for job_id in ids if (job_id < after if newest_first else job_id > after)
                ]
            positions = self._positions()
            return [self._job(self._records[job_id], positions) for job_id in ids[:limit]]

    def cancel(self, job_id: str) -> Job | None:
        """End a job without a video; one that has ended already stays as it is.

        Raises:
            OutputError: The disk refuses the record.
        """
        with self._changed:
            record = self._records.get(job_id)
            if record and record.result is None:
                running = self._running if self._is_running(job_id) else None
                began = running.began if running else None
                self._end(record, Result("cancelled", time.time(), began))
                if running:
                    self._stop_running()  # the worker removes its files
                else:
                    remove_files(self.folder, job_id, keep_request=True)
            return self.get(job_id)

    def delete(self, job_id: str) -> bool:
        """Remove a job and its files, also while it is rendered; tell whether there was one."""
        with self._changed:
            if self._records.pop(job_id, None) is None:
                return False
            self._queue.pop(job_id, None)
            record_path(self.folder, job_id).unlink(missing_ok=True)
            flush_folder(self.folder)
            if self._is_running(job_id):
                self._stop_running()  # the worker removes its files
            else:
                remove_files(self.folder, job_id)
        return True

    # For the worker

    def take(self) -> JobRecord | None:
        """Wait for the next job and mark it as being rendered; None once the store is closed."""
        with self._changed:
            while not (self._queue or self._closed):
                self._changed.wait()
            if self._closed:
                return None
            job_id = next(iter(self._queue))
            self._running = Running(job_id)
            return self._records[job_id]

    def begin(self, video: Video) -> None:
        """Name the video of the job that is being rendered; stop it if the job has ended."""
        with self._changed:
            assert self._running is not None
            self._running.video = video
            if self._closed or self._running.id not in self._queue:
                video.stop()

    def report_frames(self, frames: int) -> None:
        """Take note of how many frames the job that is being rendered has."""
        if self._running is not None:
            self._running.frames = frames

    def release(self, result: Result | None) -> bool:
        """End the turn of the job that is being rendered.

        Args:
            result: How the job ended; None: it was interrupted, and is first in the queue.

        Returns:
            Whether this is its result now. It is not where the job was cancelled or deleted
            meanwhile: then its files are gone.
        """
        with self._changed:
            running, self._running = self._running, None
            assert running is not None
            record = self._records.get(running.id)
            if record is None or record.result is not None:
                remove_files(self.folder, running.id, keep_request=record is not None)
                return False
            if result is None:
                return False
            if result.status != "completed":
                remove_files(self.folder, running.id, keep_request=True)
            try:
                self._end(record, result)
            except OutputError as error:  # after a restart the video is seen to be there
                _log.error("the result of a job is not on the disk: %s", error)
                self._records[running.id] = msgspec.structs.replace(record, result=result)
                self._queue.pop(running.id)
            return True

    # All that follows is called with the lock held, or before another thread knows the store

    def _add(self, draft: Draft, job_id: str, frames: int | None, result: Result | None) -> Job:
        try:
            record = write_job(
                self.folder,
                draft,
                job_id,
                config=self._config,
                bundle=self._bundle,
                frames=frames,
                result=result,
            )
        except BaseException:
            remove_files(self.folder, job_id)
            raise
        with self._changed:
            self._records[job_id] = record
            if result is None:
                self._queue[job_id] = None
                self._changed.notify_all()
            return self._job(record, self._positions())

    def _end(self, record: JobRecord, result: Result) -> None:
        ended = msgspec.structs.replace(record, result=result)
        write_record(self.folder, ended)
        self._records[record.id] = ended
        self._queue.pop(record.id, None)

    def _job(self, record: JobRecord, positions: dict[str, int]) -> Job:
        result, running = record.result, self._running
        status: Status = result.status if result else "queued"
        frames, began = 0, result.began if result else None
        if result is None and running is not None and running.id == record.id:
            status, frames, began = "in_progress", running.frames, running.began
        if status == "completed":
            frames = record.frames
        position = positions.get(record.id) if status == "queued" else None
        return Job(record, status, frames, began, position, video_path(self.folder, record.id))

    def _positions(self) -> dict[str, int]:
        return {job_id: number for number, job_id in enumerate(self._queue)}

    def _is_running(self, job_id: str) -> bool:
        return self._running is not None and self._running.id == job_id

    def _stop_running(self) -> None:
        if self._running is not None and self._running.video is not None:
            self._running.video.stop()

    def _new_id(self) -> str:
        with self._changed:
            self._latest = max(time.time_ns(), self._latest + 1)
            return f"video_{self._latest:016x}{secrets.token_hex(4)}"

    def _read(self) -> None:
        for path in sorted(self.folder.glob("video_*.json")):
            if ID.fullmatch(path.stem):
                record = read_record(path)
                self._records[record.id] = record
        self._queue = {job_id: None for job_id, job in self._records.items() if job.result is None}
        others = {
            record.model
            for record in map(self._records.__getitem__, self._queue)
            if record.bundle != self._bundle
        }
        if others:
            raise ConfigError(
                f"jobs of another bundle ({', '.join(sorted(others))}) wait in {self.folder}: "
                "serve that bundle, or choose another --out"
            )
        self._latest = int(max(self._records, default="video_0")[6:22], 16)
        for path in [*self.folder.iterdir()]:
            name = _OWN_FILES.fullmatch(path.name)
            if name and name[1] not in self._records:
                remove_path(path)
        for record in self._records.values():
            if record.result is not None and record.result.status != "completed":
                remove_files(self.folder, record.id, keep_request=True)
