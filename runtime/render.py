"""Render a video into a file, resumably: consume a session's stream and record its progress."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from packforcing.config import Config
from packforcing.errors import ConfigError, RenderStopped
from packforcing.prompts import Timeline
from packforcing.runtime.allocations import archive_bytes
from packforcing.runtime.archive import stored_blocks
from packforcing.runtime.arguments import check_number
from packforcing.runtime.backends import threads_of
from packforcing.runtime.blocks import Block, BlockInfo
from packforcing.runtime.bundle import bundle_digest, digest_fields
from packforcing.runtime.metadata import (
    SwitchInfo,
    describe_video,
    encode_metadata,
    switch_infos,
)
from packforcing.runtime.plan import LONGEST
from packforcing.runtime.request import frames_before
from packforcing.runtime.resume import (
    SNAPSHOT_SECONDS,
    RenderFolder,
    remove_leftovers,
    render_folder,
    snapshot_interval,
    unfinished_record,
)
from packforcing.runtime.video import Video, stream_video
from packforcing.runtime.video_filters import NO_FILTERS, VideoFilters
from packforcing.sampler import describe_steps

if TYPE_CHECKING:
    from packforcing.runtime.render_lock import LockedFolder
    from packforcing.runtime.rollout import Rollout
    from packforcing.runtime.session import Session


@dataclass(frozen=True)
class RenderSummary:
    """What `Session.render` did.

    Attributes:
        frames: Frames of the video.
        blocks: Blocks of the video.
        frames_resumed: Those of `frames` that the last snapshot of an earlier run had.
        frames_recovered: Those after them that the earlier run had generated too: they were decoded
            and committed again.
        seconds_total: Wall time of this run.
        seconds_recovered: Those of `seconds_total` until the last recovered frame.
        seconds_graphs: Time inside each graph since then, by name.
        seconds_video: Time spent encoding and writing the video since then.
        archive_bytes: Size of the archive.
        prompts: Each prompt and when the video begins to follow it.
    """

    frames: int
    blocks: int
    frames_resumed: int
    frames_recovered: int
    seconds_total: float
    seconds_recovered: float
    seconds_graphs: dict[str, float]
    seconds_video: float
    archive_bytes: int
    prompts: list[SwitchInfo]

    @property
    def frames_generated(self) -> int:
        """Frames that this run generated, not an earlier one."""
        return self.frames - self.frames_resumed - self.frames_recovered

    @property
    def seconds_generating(self) -> float:
        """Wall time that the generated frames took."""
        return self.seconds_total - self.seconds_recovered


class _Stopwatch:
    """Measures what a run generates: the time up to the last recovered block is kept apart."""

    def __init__(self, video: Video) -> None:
        self._video, self._began = video, time.perf_counter()
        self.frames_before, self.seconds_before = 0, 0.0
        self._graphs, self.seconds_video = dict(video.graph_seconds), 0.0

    def begin_again(self, frames: int) -> None:
        """Measure from here on; so many frames of the video are an earlier run's."""
        self.frames_before, self.seconds_before = frames, self.seconds
        self._graphs, self.seconds_video = dict(self._video.graph_seconds), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def seconds_graphs(self) -> dict[str, float]:
        return {
            name: seconds - self._graphs[name]
            for name, seconds in self._video.graph_seconds.items()
        }


class _FolderRecorder:
    """Records a video's progress in its render folder."""

    def __init__(self, render: RenderFolder) -> None:
        self._render = render
        self.first_block = render.record.block
        # not in the render's own folder: Windows would not remove it while a file in it is mapped
        self.folder = render.path.parent
        self._recorded: Mapping[int, np.ndarray] = {}

    def restore(self, rollout: Rollout) -> Mapping[int, np.ndarray]:
        self._render.restore(rollout)
        self._recorded = self._render.read_latents()
        return self._recorded

    def before_block(self, rollout: Rollout, block: int) -> None:
        if block > self.first_block and block % self._render.interval == 0:
            self._render.save(rollout)

    def after_block(self, block: int, latents: np.ndarray) -> None:
        # of clean latents only a call at t = 0 makes keys and values: a block that its last step
        # commits is generated again
        if block not in self._recorded and self._render.config.policy.commit == "clean":
            self._render.add_latents(block, latents)


def render_video(
    session: Session,
    video: Video,
    path: str | os.PathLike[str],
    *,
    on_block: Callable[[BlockInfo], None] | None = None,
    on_frames: Callable[[Block], None] | None = None,
    resume: bool = False,
    checkpoint_seconds: float = SNAPSHOT_SECONDS,
    locked: LockedFolder | None = None,
    metadata: bool = True,
    filters: VideoFilters = NO_FILTERS,
) -> RenderSummary:
    """Render a video into a file; `Session.render` describes arguments and errors.

    Args:
        session: Has the graphs.
        video: Has an end, and has not begun.
        path: The output.
        on_block: Called after each block.
        on_frames: Called after each block as well, with its frames.
        resume: Continue an interrupted render, if there is one.
        checkpoint_seconds: Seconds of video between two snapshots.
        locked: The folder of the render, where the caller has locked it; the output is not there.
        metadata: Whether the file says how it was made.
        filters: What happens to the frames on their way to the file.
    """
    from packforcing.runtime.video_files import check_output
    from packforcing.runtime.video_forms import STREAM, output_target

    request, timeline = video.request, video.request.timeline
    assert request.frames is not None and timeline.blocks is not None
    streamed = output_target(path)[0] is STREAM
    if streamed and resume:
        raise ConfigError("standard output cannot be resumed")
    config = video.config
    session.use_threads(_recorded_threads(path) if resume else None)
    stopwatch = _Stopwatch(video)
    checkpoint_seconds = check_number(
        "checkpoint_seconds", checkpoint_seconds, LONGEST, f"above 0 and at most {LONGEST:.0f}"
    )
    interval = snapshot_interval(config, checkpoint_seconds)
    fields = _request_fields(session, video, path, interval, filters)
    made = describe_video(session.manifest, config, request, filters)
    comment = encode_metadata(made) if metadata else ""
    frames_resumed = request.frames
    if streamed:
        frames_resumed = 0
        stream = stream_video(video, on_block, on_frames)
        _write_stream(path, config, stream, stopwatch, comment, filters)
    elif locked or not (resume and remove_leftovers(path, fields)):
        size = filters.size(config.width, config.height)
        check_output(path, filters.rate(request.frames), *size)
        length = request.frames, timeline.blocks
        limit = request.archive_limit
        with render_folder(path, config, fields, *length, resume, locked, limit, filters) as render:
            frames_resumed = frames_before(render.record.block, timeline, config)
            video.record(_FolderRecorder(render))
            try:
                _write_segments(video, render, on_block, on_frames, stopwatch)
            except RenderStopped as error:
                raise RenderStopped(f"{error}; {render.remedy}") from None
            stopwatch.seconds_video += _join_segments(
                render, path, config, timeline.blocks, comment, filters
            )
            render.remove()
    return RenderSummary(
        frames=request.frames,
        blocks=timeline.blocks,
        frames_resumed=frames_resumed,
        frames_recovered=max(0, stopwatch.frames_before - frames_resumed),
        seconds_total=stopwatch.seconds,
        seconds_recovered=stopwatch.seconds_before,
        seconds_graphs=stopwatch.seconds_graphs,
        seconds_video=stopwatch.seconds_video,
        archive_bytes=archive_bytes(
            config,
            config.policy.sink + stored_blocks(config, timeline.blocks, request.archive_limit),
        ),
        prompts=switch_infos(timeline, config),
    )


def _write_stream(
    path: str | os.PathLike[str],
    config: Config,
    stream: Iterator[np.ndarray],
    stopwatch: _Stopwatch,
    comment: str,
    filters: VideoFilters,
) -> None:
    """Write a video to standard output as it is made."""
    from packforcing.runtime.video_files import open_video

    then = "a video on standard output cannot be resumed"
    size, fps = filters.size(config.width, config.height), filters.rate(config.fps)
    with open_video(path, *size, fps, then, comment) as file:
        for frames in filters.apply(stream):
            began = time.perf_counter()
            file.write(frames)
            stopwatch.seconds_video += time.perf_counter() - began


def _write_segments(
    video: Video,
    render: RenderFolder,
    on_block: Callable[[BlockInfo], None] | None,
    on_frames: Callable[[Block], None] | None,
    stopwatch: _Stopwatch,
) -> None:
    """Write the segments that are missing."""
    from packforcing.runtime.video_files import open_video

    latest: list[BlockInfo] = []

    def after_block(info: BlockInfo) -> None:
        latest[:] = [info]
        if on_block:
            on_block(info)

    config, blocks = video.config, video.request.timeline.blocks
    assert blocks is not None
    stream = stream_video(video, after_block, on_frames)
    for block in range(render.record.block, blocks, render.interval):
        part = islice(stream, render.interval)
        first = next(part)  # the snapshot before it is saved before the segment's file is open
        segment = render.segment(block)
        size = config.width, config.height, config.fps
        with open_video(segment, *size, render.remedy) as file:
            for frames in chain((first,), part):
                began = time.perf_counter()
                file.write(frames)
                stopwatch.seconds_video += time.perf_counter() - began
                if latest[0].recovered:
                    stopwatch.begin_again(latest[0].frames)


def _join_segments(
    render: RenderFolder,
    path: str | os.PathLike[str],
    config: Config,
    blocks: int,
    comment: str,
    filters: VideoFilters,
) -> float:
    """Join the segments and give the video its name; return the seconds it took."""
    from packforcing.runtime.video_files import join_segments

    began = time.perf_counter()
    size, segments = (config.width, config.height, config.fps), render.segments(blocks)
    joined = join_segments(segments, path, render.path, *size, render.remedy, comment, filters)
    render.place(joined)
    return time.perf_counter() - began


def _request_fields(
    session: Session,
    video: Video,
    path: str | os.PathLike[str],
    interval: int,
    filters: VideoFilters,
) -> dict[str, str]:
    """Describe all that decides about the frames and their encoding, by name."""
    import av

    from packforcing import __version__
    from packforcing.runtime.backends.onnxruntime import import_onnxruntime
    from packforcing.runtime.video_forms import segment_suffix

    config, own, request = video.config, session.manifest.config, video.request
    other_steps = describe_steps(config) != describe_steps(own)  # not named by older releases
    limit = request.archive_limit
    return {
        **({} if limit is None else {"archive": f"{limit} blocks"}),
        **({"filters": str(filters)} if filters else {}),
        "output": segment_suffix(path, lossless=bool(filters)),
        "frames": str(request.frames),
        "seed": str(request.seed),
        "prompts": _digest_prompts(request.timeline),
        "start": "none" if request.start is None else _digest(request.start),
        "interval": str(interval),
        "bundle": bundle_digest(session.manifest),
        "policy": msgspec.json.encode(digest_fields(config.policy)).decode(),
        **({"denoising": describe_steps(config)} if other_steps else {}),
        "runs on": session.backend.identity,
        "made with": f"packforcing {__version__}, onnxruntime {import_onnxruntime().__version__}, "
        f"av {av.__version__}",
    }


def _recorded_threads(path: str | os.PathLike[str]) -> int | None:
    """Return the CPU threads that an unfinished render of `path` began with."""
    record = unfinished_record(path)
    return threads_of(record.request.get("runs on", "")) if record else None


def _digest_prompts(timeline: Timeline) -> str:
    lines = [
        f"{block} {switch.effect} {_digest(timeline.embeddings[block])}"
        + (f" over {switch.over}" if switch.over > 1 else "")
        for block, switch in timeline.switches.items()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
