"""The live video of a server: one at a time, steered while it is made."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from packforcing.app.jobs.records import Draft
from packforcing.app.jobs.store import Job, Store
from packforcing.app.server.broadcast import Broadcast
from packforcing.app.server.recording import Recording
from packforcing.app.server.show import Show
from packforcing.config import Policy
from packforcing.errors import LiveError, PackForcingError
from packforcing.presets import policies, switch_history
from packforcing.prompts import History, Prompt
from packforcing.runtime import Session
from packforcing.runtime.allocations import archive_bytes, device_bytes, host_bytes
from packforcing.runtime.archive import stored_blocks
from packforcing.runtime.bundle import GPU_GRAPHS
from packforcing.runtime.device import HostDevice
from packforcing.runtime.engine_records import graph_files
from packforcing.runtime.start_clip import Fit
from packforcing.runtime.video import LEAD, Video
from packforcing.words import KINDS

UNWATCHED_SECONDS = 30.0  # without a viewer, after which a video pauses

_log = logging.getLogger(__name__)


class Stage:
    """Makes the live video and shows it.

    One thread makes blocks, another encodes the block before meanwhile. All methods may be called
    from every thread.

    Attributes:
        session: Makes the videos.
        broadcast: Has the viewers.
        show: The current video, or None before the first one.
        steerable: Whether a video may be begun and switched here.
    """

    def __init__(
        self,
        session: Session,
        store: Store | None = None,
        *,
        unwatched_seconds: float = UNWATCHED_SECONDS,
        lead: float | None = LEAD,
        beside: Callable[[Video], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Make a stage without a video.

        Args:
            session: Makes the videos.
            store: Gets recordings. None: the stage only shows what is made elsewhere.
            unwatched_seconds: Without a viewer and a recording, after which a video pauses.
            lead: Blocks that a video is made ahead of playback; None: as fast as possible.
            beside: Makes room for a video, which is made inside its block.
        """
        self.session, self.steerable, self._store = session, store is not None, store
        self._beside = beside
        self.broadcast = Broadcast(self.describe, self._follow_audience)
        self.show: Show | None = None
        self._maker: threading.Thread | None = None
        self._lock = threading.Lock()  # of what begins
        self._audience_lock = threading.Lock()
        self._unwatched_seconds, self._lead = unwatched_seconds, lead
        self._watched = time.monotonic()  # when somebody did so for the last time
        self._bundle = _describe_bundle(session)
        self._memory = _describe_memory(session, None)

    def begin(
        self,
        prompt: Prompt,
        seed: int | None = None,
        *,
        policy: Policy | None = None,
        frames: np.ndarray | None = None,
        start: bytes | None = None,
        start_fit: Fit = "fill",
    ) -> None:
        """Begin a video in place of the current one.

        Args:
            prompt: What it shows.
            seed: Of the noise; None: a random one.
            policy: Which history blocks read; None: the session's.
            frames: That it begins with, uint8 RGB [T, H, W, 3].
            start: The picture or clip that they are of, as uploaded.
            start_fit: What became of a start of another shape.

        Raises:
            PackForcingError: It cannot be made.
        """
        seed = secrets.randbits(32) if seed is None else seed
        with self._lock:
            video = self.session.begin(prompt, seed, start=frames, policy=policy, lead=self._lead)
            earlier, maker = self.show, self._maker
            if earlier is not None:
                earlier.stop()
            show = self.present(video, start, start_fit)
            self._maker = threading.Thread(
                target=self._make, args=(show, maker), name="packforcing-live", daemon=True
            )
            self._maker.start()

    def present(self, video: Video, start: bytes | None = None, start_fit: Fit = "fill") -> Show:
        """Show a video to whose show somebody adds the blocks.

        Args:
            video: Makes them.
            start: The picture or clip that it begins with, as uploaded.
            start_fit: What became of a start of another shape.
        """
        policy = _policy_name(self.session, video.config.policy)
        show = Show(video, policy, self.broadcast, start, start_fit)
        self._memory = _describe_memory(self.session, video)
        self._watched = time.monotonic()
        self.show = show
        self.broadcast.begin(show.header)
        return show

    def switch(self, prompt: Prompt, history: History | None = None, over: int = 1) -> int:
        """Follow another prompt; return the first block that does.

        Raises:
            LiveError: There is no video to switch.
            PromptError: The prompt cannot be followed.
        """
        return self._current().video.switch(prompt, history, over=over)

    def pause(self) -> None:
        """Begin no further block; raise `LiveError` without a video."""
        self._current().pause()

    def proceed(self) -> None:
        """End a pause; raise `LiveError` without a video."""
        self._current().proceed()

    def stop(self) -> None:
        """End the video before its next call of a graph; raise `LiveError` without one."""
        self._current().stop()

    def record(self) -> None:
        """Record the video from its next block on.

        Raises:
            LiveError: There is no video, or it is being recorded already.
            OutputError: The disk refuses it.
        """
        assert self._store is not None
        show = self._current()
        show.record(self._store.spare_path(".mp4"))
        show.rest(False)

    def finish_recording(self) -> Job:
        """End the recording and return it as a job that is completed.

        Raises:
            LiveError: Nothing is being recorded.
            OutputError: The disk refuses it.
        """
        show = self.show
        recording = None if show is None else show.take_recording()
        if show is None or recording is None:
            raise LiveError("nothing is being recorded")
        return self._add_recording(show, recording)

    def draft(self, seconds: float | None = None) -> Draft:
        """Return what renders the frames of the live video, from its beginning, once more.

        Args:
            seconds: Length; None: as long as the live video is so far.

        Raises:
            LiveError: There is no block to render once more.
        """
        if self.show is None or not self.show.frames:
            raise LiveError("there is no block of a live video yet")
        return _draft(self.show, seconds)

    def _add_recording(self, show: Show, recording: Recording) -> Job:
        assert self._store is not None
        end_seconds = (recording.first_frame + recording.frames) / show.video.config.fps
        path = self._store.spare_path(".mp4")
        recording.finish(path)
        return self._store.add_recording(_draft(show, end_seconds), path, recording.frames)

    def close(self) -> None:
        """End the video and all streams."""
        with self._lock:
            if self.show is not None:
                self.show.stop()
            if self._maker is not None:
                self._maker.join()
        self.broadcast.end()

    def describe(self, *, blocks: bool = False) -> dict[str, Any]:
        """Return the state, for JSON.

        Args:
            blocks: Whether the latest blocks are in it.
        """
        return {
            "bundle": self._bundle,
            "memory": self._memory,
            "steerable": self.steerable,
            "video": self.show and self.show.describe(),
            **({"blocks": self.show.describe_blocks() if self.show else []} if blocks else {}),
        }

    def _current(self) -> Show:
        if self.show is None or not self.show.live:
            raise LiveError("there is no live video: begin one")
        return self.show

    def _make(self, show: Show, earlier: threading.Thread | None) -> None:
        """Make the blocks of a video, until it is stopped or fails."""
        error = None
        if earlier is not None:
            earlier.join()  # its buffers serve this video
        try:
            with (
                self._beside(show.video),
                show.video,
                ThreadPoolExecutor(1, "packforcing-encoder") as encoder,
            ):
                encoded: Future[None] | None = None
                for block in show.video:
                    if encoded is not None:
                        encoded.result()
                    encoded = encoder.submit(show.add, block)
                    self._rest_unwatched(show)
                if encoded is not None:
                    encoded.result()
        except PackForcingError as failure:
            error = str(failure)
        except Exception:
            _log.exception("the live video failed")
            error = "an internal error; the log of the server has the details"
        show.end(error and " ".join(error.split()))
        if (recording := show.take_recording()) is not None:
            try:
                self._add_recording(show, recording)
            except PackForcingError as failure:
                show.report(f"the recording is lost: {failure}")

    def _rest_unwatched(self, show: Show) -> None:
        with self._audience_lock:
            if self.broadcast.viewers:
                self._watched = time.monotonic()
            elif time.monotonic() - self._watched >= self._unwatched_seconds:
                show.rest(not show.recording)

    def _follow_audience(self) -> None:
        with self._audience_lock:
            self._watched = time.monotonic()
            if self.show is not None and self.broadcast.viewers:
                self.show.rest(False)
        self.broadcast.announce()


def _draft(show: Show, seconds: float | None) -> Draft:
    video = show.video
    seconds = show.frames / video.config.fps if seconds is None else seconds
    return Draft(
        prompts=[switch for switch in show.schedule() if switch.time < seconds],
        seconds=seconds,
        seed=video.request.seed,
        policy=video.request.policy,
        start=show.start,
        start_fit=show.start_fit,
        archive_limit=video.request.archive_limit,
    )


def _policy_name(session: Session, policy: Policy) -> str:
    named = policies(session.manifest.config)
    return next((name for name in named if named[name] == policy), "bundle")


def _describe_bundle(session: Session) -> dict[str, Any]:
    config = session.config
    name = _policy_name(session, config.policy)
    named = dict.fromkeys((name, *policies(session.manifest.config)))
    return {
        "name": config.name,
        "width": config.width,
        "height": config.height,
        "fps": config.fps,
        "block_frames": config.block_pixel_frames,
        "text_encoder": config.text_encoder,
        "policy": name,
        "policies": list(named) if session.backend.any_policy else [name],
        "default_history": switch_history(config),
        "words": KINDS if config.text_encoder == "words" else None,
    }


def _describe_memory(session: Session, video: Video | None) -> list[dict[str, Any]]:
    """List what a video takes, its archive when that is full included, for JSON."""
    on_host = type(session.backend.device) is HostDevice
    config = session.config if video is None else video.config
    weights = {True: 0, False: 0}  # by whether a graph runs on the device
    for graph in session.manifest.graphs:
        files = graph_files(session.manifest, graph)
        weights[graph in GPU_GRAPHS] += sum(session.manifest.files[name].bytes for name in files)
    device = {"weights": weights[True], **device_bytes(config)}
    host = {"weights of prompt and encoder": weights[False]}
    if not on_host:
        shared = getattr(session.backend.device, "integrated", False)
        host["pinned copies"] = host_bytes(config, shared=shared)
    if video is not None:
        request = video.request
        rows = stored_blocks(config, request.timeline.blocks, request.archive_limit)
        host["archive, when full"] = archive_bytes(config, config.policy.sink + rows)
    places = (device, "host" if on_host else "device"), (host, "host")
    return [
        {"name": name, "bytes": size, "where": where}
        for sizes, where in places
        for name, size in sizes.items()
        if size
    ]
