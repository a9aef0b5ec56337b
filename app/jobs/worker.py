"""The thread that renders jobs, one after the other, with the session of the program around it."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import numpy as np

from packforcing.app.jobs.records import Draft, JobRecord, Result, start_path, video_path
from packforcing.app.jobs.store import Store
from packforcing.errors import PackForcingError, RenderStopped, ResumeError
from packforcing.runtime.render import render_video
from packforcing.runtime.render_lock import delete, render_places
from packforcing.runtime.session import Session
from packforcing.runtime.start_clip import load_video_start
from packforcing.runtime.video import Video

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


class Worker:
    """Renders the jobs of a store in a thread of its own.

    Blocks of a job and of other videos of the session are made in turns. A job that was
    interrupted, by the end of the process or by the memory that a live video needs, resumes.
    """

    def __init__(self, session: Session, store: Store) -> None:
        """Make a worker; `start` begins the work.

        Args:
            session: Makes the videos.
            store: Has the jobs. Closing it ends the thread.
        """
        self._session, self._store = session, store
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)

    def start(self) -> None:
        """Begin to render."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended; the store is closed."""
        self._thread.join()

    def _work(self) -> None:
        while (record := self._store.take()) is not None:
            began = time.time()
            try:
                error = self._render(record)
            except RenderStopped:
                self._store.release(None)
                continue
            now = time.time()
            result = Result("failed" if error else "completed", now, began, error or "")
            if self._store.release(result):
                _log.info("job %s: %s after %.1f s", record.id, result.status, now - began)

    def _render(self, record: JobRecord) -> str | None:
        """Render a job; return why it failed, or None.

        Raises:
            RenderStopped: The job is to end or to wait.
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
        except RenderStopped:
            raise
        except PackForcingError as error:
            return str(error).replace(str(path), "the video")
        except Exception:
            _log.exception("job %s failed", record.id)
            return "an internal error; the log of the server has the details"
        return None

    def _make(self, record: JobRecord, path: Path) -> None:
        store, session = self._store, self._session
        draft = store.read_draft(record)
        start = None
        if record.start:
            source = start_path(store.folder, record.id)
            start = load_video_start(source, session.config, record.start_fit).frames
        video = begin_video(session, draft, start)
        store.begin(video)
        render_video(
            session,
            video,
            path,
            on_block=lambda info: store.report_frames(info.frames),
            resume=True,
        )
