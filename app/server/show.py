"""A video as viewers see it: its fragments, the record of its blocks, and its state."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from packforcing.app.server.broadcast import Broadcast, Header
from packforcing.app.server.recording import Recording
from packforcing.errors import LiveError, OutputError
from packforcing.prompts import Switch, prompt_words
from packforcing.runtime.blocks import Block, BlockInfo
from packforcing.runtime.fragments import FragmentEncoder
from packforcing.runtime.start_clip import Fit
from packforcing.runtime.video import Video

RECORDED_BLOCKS = 240  # of which a viewer who comes learns

State = Literal["running", "paused", "unwatched", "stopped", "ended", "failed"]


class Show:
    """Encodes the blocks of one video, each once, and broadcasts them.

    `add` is called by one thread, all else from every thread.

    Attributes:
        id: Tells the video from those before and after it.
        video: Makes the blocks.
        start: The picture or clip that it begins with, as uploaded.
        start_fit: What became of a start of another shape.
        header: What its fragments follow.
        blocks: Blocks that were added.
        frames: Frames of all blocks that were added.
    """

    def __init__(
        self,
        video: Video,
        policy: str,
        broadcast: Broadcast,
        start: bytes | None = None,
        start_fit: Fit = "fill",
    ) -> None:
        """Make ready to show a video.

        Args:
            video: Makes uint8 frames.
            policy: The name of its policy.
            broadcast: Has the viewers.
            start: The picture or clip that it begins with, as uploaded.
            start_fit: What became of a start of another shape.
        """
        config = video.config
        self.id, self.video = f"live_{secrets.token_hex(8)}", video
        self.start, self.start_fit = start, start_fit
        self._policy, self._broadcast = policy, broadcast
        self._encoder = FragmentEncoder(config.width, config.height, config.fps)
        self.header = Header(self.id, self._encoder.mime, self._encoder.header)
        self.blocks, self.frames = 0, 0
        self._lock = threading.Lock()
        self._latest: deque[dict[str, Any]] = deque(maxlen=RECORDED_BLOCKS)
        self._scene, self._behind_seconds = 0, 0.0
        self._paused, self._unwatched, self._stopping = False, False, False
        self._ending: State | None = None
        self._error: str | None = None
        self._recording: Recording | None = None
        self._recording_lock = threading.Lock()  # held while a block is written

    def add(self, block: Block) -> None:
        """Encode the next block and send it to the viewers."""
        assert isinstance(block.frames, np.ndarray)
        info, count, began = block.info, len(block.frames), time.perf_counter()
        fragment = self._encoder.encode(block.frames, info.frames - count)
        encode_seconds = time.perf_counter() - began
        if not self.blocks:  # a render that is resumed begins later
            switches = self.video.request.timeline.switches
            cuts = [cut for cut in switches if cut < info.index and switches[cut].effect == "cut"]
            self._scene = max(cuts, default=0)
        if info.switch is not None and info.switch.effect == "cut":
            self._scene = info.index
        entry = self._describe_block(info, count, encode_seconds)
        with self._recording_lock:  # a recording begins before a block or after it
            self._add_to_recording(fragment, count)
            self.blocks, self.frames = info.index + 1, info.frames
        with self._lock:
            self._latest.append(entry)
            waited = round(info.behind_seconds, 1) != round(self._behind_seconds, 1)
            self._behind_seconds = info.behind_seconds
        self._broadcast.publish(self.header, entry, fragment)
        if waited or entry["switch"]:
            self._broadcast.announce()

    def _add_to_recording(self, fragment: bytes, frames: int) -> None:
        """Record a block; a disk that refuses it ends the recording, and not the video."""
        if self._recording is not None:
            try:
                self._recording.add(fragment, frames)
            except OutputError as error:
                self._recording = None
                self.report(f"the recording has ended: {error}")

    def report(self, problem: str | None) -> None:
        """Tell viewers in one line what is wrong; the video continues. None: nothing any more."""
        self._error = problem
        self._broadcast.announce()

    def record(self, path: Path) -> None:
        """Record all blocks from the next one on to a file.

        Raises:
            LiveError: The video is being recorded already, or has ended.
            OutputError: The file cannot be written.
        """
        with self._recording_lock:
            if self._recording is not None:
                raise LiveError("the video is being recorded already")
            if not self.live:
                raise LiveError("the video has ended: begin another one to record")
            self._recording = Recording(path, self.header.data, self.frames)
        self.report(None)

    def take_recording(self) -> Recording | None:
        """End the recording and return it, if there is one."""
        with self._recording_lock:
            recording, self._recording = self._recording, None
        self._broadcast.announce()
        return recording

    @property
    def recording(self) -> bool:
        return self._recording is not None

    def end(self, error: str | None = None) -> None:
        """Take note that there is no further block.

        Args:
            error: Why it failed, in one line; None: it did not.
        """
        ended: State = "ended" if self.video.finished else "stopped"
        with self._lock:
            self._ending, self._error = "failed" if error else ended, error
        self._encoder.close()
        self._broadcast.announce()

    @property
    def state(self) -> State:
        if self._ending is not None:
            return self._ending
        if self._stopping:
            return "stopped"
        if self._paused:
            return "paused"
        return "unwatched" if self._unwatched else "running"

    @property
    def live(self) -> bool:
        """Whether it may have further blocks."""
        return self.state in ("running", "paused", "unwatched")

    def pause(self) -> None:
        """Begin no further block before `proceed` or `stop`."""
        self._change(paused=True)

    def proceed(self) -> None:
        """End a pause."""
        self._change(paused=False)

    def rest(self, unwatched: bool) -> None:
        """Pause while nobody watches, whatever else pauses it."""
        self._change(unwatched=unwatched)

    def _change(self, *, paused: bool | None = None, unwatched: bool | None = None) -> None:
        with self._lock:
            before = self._paused, self._unwatched
            self._paused = self._paused if paused is None else paused
            self._unwatched = self._unwatched if unwatched is None else unwatched
            if self._paused or self._unwatched:
                self.video.pause()
            else:
                self.video.proceed()
            changed = before != (self._paused, self._unwatched)
        if changed:
            self._broadcast.announce()

    def stop(self) -> None:
        """End the video before its next call of a graph."""
        self._stopping = True
        self.video.stop()
        self._broadcast.announce()

    def schedule(self) -> list[Switch]:
        """Return the switches that the blocks which were added follow."""
        return [
            switch for switch in self.video.schedule if (switch.block or 0) < max(1, self.blocks)
        ]

    def describe(self) -> dict[str, Any]:
        """Return the state, for JSON."""
        request, schedule, recording = self.video.request, self.schedule(), self._recording
        fps = self.video.config.fps
        return {
            "id": self.id,
            "state": self.state,
            "error": self._error,
            "prompt": prompt_words(schedule[-1].prompt),
            "seed": request.seed,
            "policy": self._policy,
            "block": self.blocks,
            "frames": self.frames,
            "seconds": self.frames / fps,
            "schedule": describe_schedule(schedule),
            "recording": recording and {"since_seconds": recording.first_frame / fps},
            "viewers": self._broadcast.viewers,
            "behind_seconds": self._behind_seconds,
            "archive_limit": request.archive_limit,
            "blocks_total": request.timeline.blocks,
        }

    def describe_blocks(self) -> list[dict[str, Any]]:
        """Return the latest blocks, for JSON."""
        with self._lock:
            return list(self._latest)

    def _describe_block(self, info: BlockInfo, count: int, encode_seconds: float) -> dict[str, Any]:
        ranges = self.video.config.policy.full_resolution_blocks(info.index - self._scene)
        switch = info.switch if info.index else None
        return {
            "index": info.index,
            "seconds": info.seconds,
            "encode_seconds": encode_seconds,
            "first_frame": info.frames - count,
            "frames": count,
            "full": [self._scene + block for blocks in ranges for block in blocks],
            "sinks": len(ranges[0]),  # the first of `full`
            "mid": info.read,
            "switch": switch and _describe_switch(switch),
        }


def describe_schedule(switches: Sequence[Switch]) -> list[dict[str, Any]]:
    """Return a schedule for JSON."""
    return [
        {"time": switch.time, **_describe_switch(switch), "block": switch.block}
        for switch in switches
    ]


def _describe_switch(switch: Switch) -> dict[str, Any]:
    words = prompt_words(switch.prompt)
    return {"prompt": words, "history": switch.effect, "over": switch.over}
