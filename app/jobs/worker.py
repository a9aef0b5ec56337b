"""The thread that renders jobs, one after the other, with the session of the program around it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from packforcing.app.jobs.records import Draft, JobRecord, Result, start_path, video_path
from packforcing.app.jobs.room import Room
from packforcing.app.jobs.store import Store
from packforcing.errors import PackForcingError, RenderStopped, ResumeError
from packforcing.runtime.render import render_video
from packforcing.runtime.render_lock import delete, render_places
from packforcing.runtime.session import Session
from packforcing.runtime.start_clip import load_video_start
from packforcing.runtime.video import BlockInfo, Video

_log = logging.getLogger(__name__)


def begin_video(session: Session, draft: Draft, start: np.ndarray | None) -> Video:
    """Check all of a draft that can be checked without a graph, and begin its video.

    Args:
        session: Makes the video.
        draft: What is asked for.
        start: Frames of `draft.start`, uint8 RGB [T, H, W, 3].

    Raises:
        PromptError: A prompt or a switch cannot be followed.
        ConfigError: Something else is impossible, or memory is too small.
        BackendError: The engines do not fit the policy.
    """
    return session.begin(
        draft.prompts,
        draft.seed,
        seconds=draft.seconds,
        start=start,
        policy=draft.policy,
        lead=None,
        archive_limit=draft.archive_limit,
    )


class _NoRoom(Exception):
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

    def close(self) -> None:
        """Interrupt the job that is being rendered, before its next call of a graph, and end."""
        self._store.close()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

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
        while (record := self._store.take()) is not None:
            began = time.time()
            try:
                error = self._render(record)
            except RenderStopped:
                self._store.release(None)
                continue
            except _NoRoom:
                self._store.release(None)
                with self._changed:
                    self._changed.wait_for(lambda: self._live is None or self._closed)
                continue
            now = time.time()
            result = Result("failed" if error else "completed", now, began, error or "")
            if self._store.release(result):
                _log.info("job %s: %s after %.1f s", record.id, result.status, now - began)

    def _render(self, record: JobRecord) -> str | None:
        """Render a job; return why it failed, or None.

        Raises:
            RenderStopped: The job is to end, or was interrupted.
            _NoRoom: The job has to wait.
        """
        path = video_path(self._store.folder, record.id)
        try:
            if path.exists():  # it gets its name when it is whole; a kill came before the result
                return None
            try:
                self._make(record, path)
            except ResumeError as error:  # of another release, or damaged: all of it again
                _log.warning("job %s cannot be resumed and begins again", record.id)
                _log.debug("%s", error)
                delete(render_places(path)[0])
                self._make(record, path)
        except (RenderStopped, _NoRoom):
            raise
        except PackForcingError as error:
            return str(error).replace(str(path), "the video")
        except Exception:
            _log.exception("job %s failed", record.id)
            return "an internal error; the log of the server has more"
        return None

    def _make(self, record: JobRecord, path: Path) -> None:
        store, session = self._store, self._session
        draft = store.read_draft(record)
        start = None
        if record.start:
            source = start_path(store.folder, record.id)
            start = load_video_start(source, session.config, record.start_fit).frames
        video = begin_video(session, draft, start)
        with self._changed:
            if self._live is not None and not self._room.fits(self._live, video):
                raise _NoRoom
            self._job = video
        try:
            store.begin(video)
            render_video(session, video, path, on_block=self._report, resume=True)
        finally:
            with self._changed:
                self._job = None
                self._changed.notify_all()

    def _report(self, info: BlockInfo) -> None:
        self._store.report_frames(info.frames)
