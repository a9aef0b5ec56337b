"""Render one job in this process: what the server's worker and those of `batch` share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from packforcing.app.jobs.records import Draft, JobRecord, read_draft, start_path, video_path
from packforcing.errors import PackForcingError, RenderLocked, RenderStopped, ResumeError
from packforcing.runtime.blocks import BlockInfo
from packforcing.runtime.render import render_video
from packforcing.runtime.render_lock import locked_folder
from packforcing.runtime.render_record import RECORD
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


def render_job(
    session: Session,
    folder: Path,
    record: JobRecord,
    making: Callable[[Video], AbstractContextManager[None]],
    on_block: Callable[[BlockInfo], None],
    fatal: tuple[type[PackForcingError], ...] = (),
) -> str | None:
    """Render a job, or what an earlier process left of it; the lock of the render is the claim.

    Args:
        session: Makes the video.
        folder: Of the jobs.
        record: Of the job.
        making: Makes the context in which the video is made; may stop it.
        on_block: Called after each block.
        fatal: Errors that are not the job's own, like a full disk; raised.

    Returns:
        Why the job failed; None: its video is there.

    Raises:
        RenderLocked: Another process renders it.
        RenderStopped: The video was stopped; the job resumes.
    """
    path = video_path(folder, record.id)
    try:
        try:
            _render(session, folder, record, making, on_block)
        except ResumeError as error:  # of another release, or damaged: all of it again
            _log.warning("job %s cannot be resumed and begins again", record.id)
            _log.debug("%s", error)
            _render(session, folder, record, making, on_block)
    except PackForcingError as error:
        if isinstance(error, (RenderLocked, RenderStopped, *fatal)):
            raise
        return str(error).replace(str(path), "the video")
    except Exception:
        _log.exception("job %s failed", record.id)
        return "an internal error; the log has the details"
    return None


def _render(
    session: Session,
    folder: Path,
    record: JobRecord,
    making: Callable[[Video], AbstractContextManager[None]],
    on_block: Callable[[BlockInfo], None],
) -> None:
    path = video_path(folder, record.id)
    with locked_folder(path) as locked:
        if path.exists():  # it gets its name when it is whole; a kill came before the result
            locked.remove()
            return
        try:
            draft, start = read_draft(folder, record), None
            if record.start:
                source = start_path(folder, record.id)
                start = load_video_start(source, session.config, record.start_fit).frames
            video = begin_video(session, draft, start)
            with making(video):
                render_video(session, video, path, on_block=on_block, resume=True, locked=locked)
        except ResumeError:
            locked.remove()
            raise
        except BaseException:
            if not (locked.path / RECORD).exists():  # nothing to resume
                locked.remove()
            raise
