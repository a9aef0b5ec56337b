"""The thread that renders jobs, one after the other, with the session of the program around it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from packforcing.app.jobs.execute import render_job
from packforcing.app.jobs.records import Result
from packforcing.app.jobs.room import Room
from packforcing.app.jobs.store import Store
from packforcing.errors import RenderLocked, RenderStopped
from packforcing.runtime.session import Session
from packforcing.runtime.video import BlockInfo, Video

_log = logging.getLogger(__name__)


class _NoRoom(RenderStopped):
    """A job has to wait for the memory of the live video."""


class Worker:
    """Renders the jobs of a store in a thread of its own.

    Blocks of a job and of a live video are made in turns. Where memory does not do for both, the
    live video goes first: the job is interrupted, and resumes once the live video has ended.
    """

    def __init__(self, session: Session, store: Store, room: Room) -> None:
        """Make a worker; `start` begins the work.

        Args:
            session: Makes the videos.
            store: Has the jobs.
            room: Has the memory for videos.
        """
        self._session, self._store, self._room = session, store, room
        self._thread = threading.Thread(target=self._work, name="packforcing-jobs", daemon=True)
        self._changed = threading.Condition()  # of the next three
        self._live: Video | None = None
        self._job: Video | None = None
        self._closed = False

    def start(self) -> None:
        """Begin to render."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the thread, once the store is closed."""
        self._thread.join()

    def close(self) -> None:
        """Interrupt the job that is being rendered, before its next call of a graph, and end."""
        self._store.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self.join()

    @contextmanager
    def beside(self, live: Video) -> Iterator[None]:
        """Make room for a live video, which is made inside the block."""
        with self._changed:
            self._live = live
            while self._job is not None and not self._room.fits(live, self._job):
                self._job.stop()
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                self._live = None
                self._changed.notify_all()

    def _work(self) -> None:
        folder = self._store.folder
        while (record := self._store.take()) is not None:
            began = time.time()
            try:
                error = render_job(self._session, folder, record, self._making, self._report)
            except _NoRoom:
                self._store.release(None)
                with self._changed:
                    self._changed.wait_for(lambda: self._live is None or self._closed)
                continue
            except RenderStopped:
                self._store.release(None)
                continue
            except RenderLocked as locked:
                error = str(locked)
            now = time.time()
            result = Result("failed" if error else "completed", now, began, error or "")
            if self._store.release(result):
                _log.info("job %s: %s after %.1f s", record.id, result.status, now - began)

    @contextmanager
    def _making(self, video: Video) -> Iterator[None]:
        """Name the video of the job, which is made inside the block.

        Raises:
            _NoRoom: The job has to wait.
        """
        with self._changed:
            if self._live is not None and not self._room.fits(self._live, video):
                raise _NoRoom
            self._job = video
        try:
            self._store.begin(video)
            yield
        finally:
            with self._changed:
                self._job = None
                self._changed.notify_all()

    def _report(self, info: BlockInfo) -> None:
        self._store.report_frames(info.frames)
