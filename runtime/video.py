"""One video in the making: all that changes from block to block.

Graphs, weights and the device belong to the session; a `Video` holds the rollout (cache, archive,
decoder state), the schedule and the counters. `Session` calls `next_block` and keeps the lock.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from packforcing.config import TEMPORAL_FACTOR
from packforcing.prompts import Switch
from packforcing.runtime.encoder import Encode
from packforcing.runtime.request import VideoRequest, frames_before, is_cut
from packforcing.runtime.rollout import Rollout


@dataclass(frozen=True)
class BlockInfo:
    """What `on_block` receives after each block.

    Attributes:
        index: The block, from 0 on.
        blocks: Blocks of the video.
        frames: Frames delivered so far, this block's included.
        frames_total: Frames of the video.
        read: The archived blocks that this block read.
        seconds: Wall time of the block, without the consumer's.
        switch: The switch that takes effect with this block, or None.
        recovered: Whether an interrupted run had generated it: it was decoded and committed again.
    """

    index: int
    blocks: int
    frames: int
    frames_total: int
    read: list[int]
    seconds: float
    switch: Switch | None
    recovered: bool = False


class Recorder(Protocol):
    """Follows a video, so that another process can continue it.

    Attributes:
        first_block: The block that the video continues with; 0 for a new one.
        folder: Where an archive that memory is not to hold is kept.
    """

    first_block: int
    folder: Path

    def restore(self, rollout: Rollout) -> Mapping[int, np.ndarray]:
        """Bring a rollout that has just begun to `first_block`.

        Returns:
            Clean latents [B_f, C, h, w] of later blocks that were already generated.
        """

    def before_block(self, rollout: Rollout, block: int) -> None:
        """Called between two blocks."""

    def after_block(self, block: int, latents: np.ndarray) -> None:
        """Called with the clean latents [B_f, C, h, w] of a block; they are overwritten later."""


class Video:
    """A video between two blocks.

    Attributes:
        block: The next block's index.
        frames: Frames delivered so far.
    """

    def __init__(
        self,
        rollout: Rollout,
        request: VideoRequest,
        start_latents: Mapping[int, np.ndarray],
        *,
        encode: Encode | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Begin a video, or continue it where `recorder` says.

        Args:
            rollout: Has the buffers; whatever video it made before is forgotten.
            request: What is asked for.
            start_latents: Clean latents [B_f, C, h, w] of the first blocks, by block.
            encode: Pixels to latents, for a policy that restarts.
            recorder: Follows the video.
        """
        config, timeline = rollout.config, request.timeline
        self.rollout, self.timeline = rollout, timeline
        self.block = recorder.first_block if recorder else 0
        self.frames, self.frames_total = (
            frames_before(self.block, timeline, config),
            request.frames,
        )
        self._clean, self._recorder, self._encode = dict(start_latents), recorder, encode
        self._start_blocks = len(start_latents)
        latest = max(block for block in timeline.switches if block < max(1, self.block))
        folder = recorder.folder if recorder else None
        rollout.begin(timeline.embeddings[latest], timeline.blocks, request.seed, folder)
        recovered = recorder.restore(rollout) if recorder else {}
        self._clean |= recovered
        self._recovered = frozenset(recovered)

    @property
    def finished(self) -> bool:
        return self.block == self.timeline.blocks

    def next_block(self) -> tuple[np.ndarray, BlockInfo]:
        """Make the next block.

        Returns:
            Its frames, uint8 RGB [n, H, W, 3], and what `on_block` receives.
        """
        rollout, timeline, block = self.rollout, self.timeline, self.block
        if self._recorder:
            self._recorder.before_block(rollout, block)
        began = time.perf_counter()
        switch = timeline.switches.get(block)
        if switch and block:
            rollout.switch(timeline.embeddings[block], switch.effect)
        trimmed = 0 if rollout.cache.committed else rollout.config.trimmed_frames
        rollout.first_generated = self._first_generated() - rollout.scene
        rollout.next_block(self._clean.pop(block, None))
        read = [rollout.scene + mid for mid in rollout.read]
        if self._recorder:
            self._recorder.after_block(block, rollout.buffers.latents.host[0])
        self.block += 1
        if self._restarts():
            self._restart()
        pixels = rollout.buffers.pixels.host[0]
        frames = to_bytes(pixels[trimmed : trimmed + self.frames_total - self.frames])
        self.frames += len(frames)
        seconds = time.perf_counter() - began
        return frames, BlockInfo(
            index=block,
            blocks=timeline.blocks,
            frames=self.frames,
            frames_total=self.frames_total,
            read=read,
            seconds=seconds,
            switch=switch,
            recovered=block in self._recovered,
        )

    def _first_generated(self) -> int:
        """Return the scene's first block that is generated, counted in the video.

        Latents of a resumed render were generated as well, so that they do not tell.
        """
        scene = self.rollout.scene
        is_restart = scene > 0 and not is_cut(self.timeline, scene)
        return max(self._start_blocks, scene + is_restart)

    def _restarts(self) -> bool:
        """Tell whether the block just made ends one of CausVid's rollouts."""
        rollout = self.rollout
        return (
            rollout.cache.committed == rollout.config.policy.restart
            and not self.finished
            and not is_cut(self.timeline, self.block)
        )

    def _restart(self) -> None:
        """Begin the next rollout with the block that ended this one, as CausVid does.

        A cut that is followed by that block again, its first latent frame encoded from the last
        pixel frame it was decoded to. The pixel frames before that one stay as they are.
        """
        assert self._encode is not None
        rollout = self.rollout
        pixels, latents = rollout.buffers.pixels.host[0], rollout.buffers.latents.host[0]
        (latents[0],) = self._encode([pixels[TEMPORAL_FACTOR - 1]])
        before = pixels[: rollout.config.trimmed_frames].copy()
        rollout.begin_scene(self.block - 1)
        rollout.next_block(latents)
        pixels[: len(before)] = before


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels, float32 or float16 [n, 3, H, W] in 0..1, to frames, uint8 [n, H, W, 3].

    Rounds in float32.
    """
    scaled = pixels * np.float32(255)
    scaled += np.float32(0.5)
    planes = scaled.astype(np.uint8)
    frames = np.empty((len(pixels), *pixels.shape[2:], 3), np.uint8)
    for channel in range(3):  # three strided copies: NumPy's transposed copy takes thrice as long
        frames[..., channel] = planes[:, channel]
    return frames
