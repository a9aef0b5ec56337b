"""One video in the making: all that changes from block to block.

Graphs, weights and the device belong to the session; a `Video` holds the rollout (cache, archive,
decoder state), the schedule and the counters. Iterating over it makes its blocks. While that goes
on, `switch`, `pause`, `proceed` and `stop` may be called from every thread, `stop` and `pause` from
signal handlers too: they set flags, which are looked at before every call of a graph and while
waiting. A step reads only, and a block changes the history when all of its calls are done, so a
block that is given up leaves nothing behind.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from packforcing.config import TEMPORAL_FACTOR
from packforcing.errors import BackendError, PromptError, RenderStopped
from packforcing.presets import switch_history
from packforcing.prompts import History, Prompt, Switch, check_switch, encode_prompt
from packforcing.runtime.blocks import Block, BlockInfo, FrameForm, StepInfo, convert_frames
from packforcing.runtime.pacing import PlaybackClock
from packforcing.runtime.request import VideoRequest, frames_before, is_cut, start_blocks
from packforcing.runtime.rollout import Rollout

if TYPE_CHECKING:
    from packforcing.runtime.session import Session

LEAD = 2.0  # blocks that a live video is made ahead of playback
_NAP_SECONDS = 0.02  # between two looks at the flags while waiting

_log = logging.getLogger(__name__)


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
    """A video in the making; iterate over it, with `for` or `async for`, to make its blocks.

    It ends with its last block, or when it is stopped. Leaving its `with` block, or `close`, gives
    its buffers back to the session.

    Attributes:
        request: What is asked for.
        config: The session's, with the policy of this video.
        block: The next block's index.
        frames: Frames delivered so far.
        graph_seconds: Time spent inside each graph so far, by name.
        stopped: Whether it was stopped before its last block.
    """

    def __init__(
        self,
        session: Session,
        request: VideoRequest,
        *,
        form: FrameForm = "uint8",
        lead: float | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> None:
        """Take a checked request; the buffers are allocated with the first block.

        Args:
            session: Has the graphs, and the buffers of videos that have ended.
            request: What is asked for.
            form: The form of the frames.
            lead: Blocks that may be made ahead of playback; None: make blocks as fast as possible.
            on_step: Called after each denoising step.
        """
        config = msgspec.structs.replace(session.config, policy=request.policy)
        self.request, self.config, self.block, self.frames = request, config, 0, 0
        self._session, self._form, self._on_step = session, form, on_step
        self._timeline = request.timeline.copy()  # what is switched live does not change it
        self.graph_seconds = dict.fromkeys(session.backend.graphs, 0.0)
        self._begun = 0  # blocks that have begun: a switch takes effect with the next one
        self._lock = threading.Lock()  # of the timeline
        self._rollout: Rollout | None = None
        self._backend = session.backend
        self._recorder: Recorder | None = None
        self._stop, self._paused, self._closed, self._making = False, False, False, False
        self._clock: PlaybackClock | None = None
        if lead is not None:
            self._clock = PlaybackClock(config.fps, lead * config.block_pixel_frames / config.fps)

    def __iter__(self) -> Video:
        return self

    def __next__(self) -> Block:
        """Make the next block.

        Raises:
            StopIteration: The video has ended or was stopped.
            BackendError: The session was closed, memory is too small, or a graph failed.
        """
        if self._closed or self.finished:
            self.close()
            raise StopIteration
        self._making = True
        try:
            self._wait()
            with self._session.backend.turns.turn(self._check):
                self._check()
                with self._count_graph_seconds():
                    block = self._make_block()
        except BaseException as error:
            self._closed = True
            if isinstance(error, RenderStopped):
                raise StopIteration from None
            raise
        finally:
            self._making = False
            if self._closed:
                self.close()
        if block.info.switch and block.info.index:
            _log.info("block %d: switched (%s)", block.info.index, block.info.switch.effect)
        _log.debug("block %d: %.3f s", block.info.index, block.info.seconds)
        return block

    async def __aiter__(self) -> AsyncIterator[Block]:
        """Make blocks in a thread. Cancelling the task stops the video within a call of a graph."""
        import asyncio  # here, as it takes time to import

        loop = asyncio.get_running_loop()
        with self:
            while True:
                # StopIteration cannot pass through a future: `next` returns None instead
                call = loop.run_in_executor(None, next, self, None)
                try:
                    block = await asyncio.shield(call)
                except asyncio.CancelledError:
                    self.stop()
                    await asyncio.wait([call])
                    raise
                if block is None:
                    return
                yield block

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        """Whether the last block is made."""
        return self.block == self._timeline.blocks

    @property
    def stopped(self) -> bool:
        return self._stop and not self.finished

    @property
    def seconds(self) -> float:
        """Length of what is made so far."""
        return self.frames / self.config.fps

    @property
    def schedule(self) -> list[Switch]:
        """The switches that have taken effect, each with its block and its exact time.

        A render of this schedule with the same seed, start and archive limit gives the same frames
        (`packforcing.prompts` has the exception: a policy that restarts, at a video's last block).
        """
        config = self.config
        with self._lock:
            return [
                replace(
                    switch,
                    time=frames_before(block, self._timeline, config) / config.fps,
                    block=block,
                )
                for block, switch in self._timeline.switches.items()
                if block < max(1, self.block)
            ]

    def switch(self, prompt: Prompt, history: History | None = None, *, over: int = 1) -> int:
        """Follow another prompt from the next block on, and forget switches that were to follow.

        Args:
            prompt: Words, where the model's text encoder is "words", or an embedding.
            history: What later blocks read of the past; `packforcing.prompts` has the rules. None:
                what the model was published with.
            over: Blocks that the change is spread over.

        Returns:
            The first block that it takes effect with.

        Raises:
            PromptError: It cannot be followed.
        """
        history = history or switch_history(self.config)
        check_switch(switch := Switch(0, prompt, history, over), self.config)
        embedding = encode_prompt(prompt, self.config)
        config, request = self.config, self.request
        with self._lock:
            block, timeline = self._begun, self._timeline
            if block == timeline.blocks or self._closed:
                raise PromptError("the video has ended: no block is left to follow a prompt")
            if not block:  # nothing is there yet that it could keep or cut
                switch = replace(switch, history=None, over=1)
            if switch.history == "cut" and request.start is not None:
                clip_blocks = start_blocks(config, len(request.start), timeline.blocks)
                if block < clip_blocks:
                    raise PromptError(
                        f"block {block} is of the start that the video begins with, {clip_blocks} "
                        "blocks: cut later"
                    )
            time = frames_before(block, timeline, config) / config.fps
            timeline.follow(block, replace(switch, time=time), embedding)
            if request.frames is not None:
                scenes = 1 + sum(other.history == "cut" for other in timeline.switches.values())
                blocks = config.blocks(request.frames, scenes)
                self._timeline = replace(timeline, blocks=blocks)
        return block

    def stop(self) -> None:
        """End the video before the next call of a graph; the block in the making is given up."""
        self._stop = True

    def pause(self) -> None:
        """Begin no further block before `proceed` or `stop`."""
        self._paused = True

    def proceed(self) -> None:
        """End a pause."""
        self._paused = False

    def record(self, recorder: Recorder) -> None:
        """Have a recorder follow the video, which continues where the recorder says.

        Args:
            recorder: Of this request. The video has not begun.
        """
        assert self._rollout is None
        self._recorder = recorder
        self.block = self._begun = recorder.first_block
        self.frames = frames_before(self.block, self._timeline, self.config)

    def close(self) -> None:
        """End the video and give its buffers back; safe to call twice, from every thread."""
        self._closed = True
        if self._making:  # gives them back itself, before the next call of a graph
            return
        rollout, self._rollout = self._rollout, None
        if rollout is not None:
            rollout.hooks.disconnect()
            self._session.return_rollout(rollout)

    def _check(self) -> None:
        self._session.require_open()
        if self._rollout is not None and self._backend is not self._session.backend:
            raise BackendError("the session's graphs were loaded again, to resume another video")
        if self._stop or self._closed:
            raise RenderStopped(f"stopped after {self.block} blocks")

    @contextmanager
    def _count_graph_seconds(self) -> Iterator[None]:
        """Add the time of the calls in the block, during this video's turn, to `graph_seconds`."""
        before = self._session.graph_seconds()
        try:
            yield
        finally:
            for name, seconds in self._session.graph_seconds().items():
                self.graph_seconds[name] += seconds - before[name]

    def _wait(self) -> None:
        """Wait while the video is paused, or too far ahead of playback."""
        clock = self._clock
        while True:
            self._check()
            if self._paused or self._session.paused:
                if clock:
                    clock.pause()
                time.sleep(_NAP_SECONDS)
                continue
            if not clock:
                return
            clock.proceed()
            if not (wait := clock.wait_seconds()):
                return
            time.sleep(min(wait, _NAP_SECONDS))

    def _begin(self) -> Rollout:
        """Take a rollout and bring it to the first block."""
        request, recorder = self.request, self._recorder
        with self._lock:
            text = self._timeline.followed(max(0, self.block - 1))
        rollout = self._session.lend_rollout(request.policy, request.timeline.blocks)
        self._rollout, self._backend = rollout, self._session.backend
        rollout.hooks.connect(self._check, self._report_step)
        folder = recorder.folder if recorder else None
        blocks = request.timeline.blocks
        rollout.begin(text, blocks, request.seed, folder, request.archive_limit)
        start = self._session.encode_start(request, self._check)
        recovered = recorder.restore(rollout) if recorder else {}
        self._start_blocks, self._clean = len(start), {**dict(enumerate(start)), **recovered}
        self._recovered = frozenset(recovered)
        return rollout

    def _report_step(self, step: int, steps: int) -> None:
        if self._on_step:
            self._on_step(StepInfo(self.block, step, steps))

    def _make_block(self) -> Block:
        with self._lock:  # from here on a switch is for the next block
            block, timeline = self.block, self._timeline
            self._begun, history = block + 1, timeline.history(block)
            embedding = timeline.followed(block) if history else None
        self._session.backend.device.use()
        rollout = self._rollout or self._begin()
        if self._recorder:
            self._recorder.before_block(rollout, block)
        began = time.perf_counter()
        if history and embedding is not None:
            rollout.switch(embedding, history)
        trimmed = 0 if rollout.cache.committed else self.config.trimmed_frames
        rollout.first_generated = self._first_generated(rollout.scene) - rollout.scene
        rollout.next_block(self._clean.pop(block, None))
        latents = rollout.buffers.latents.host[0].copy()
        read = [rollout.scene + mid for mid in rollout.read]
        if self._recorder:
            self._recorder.after_block(block, latents)
        if rollout.cache.committed == self.config.policy.restart and block + 1 != timeline.blocks:
            self._restart(rollout)
        total = self.request.frames
        stop = self.config.block_pixel_frames
        if total is not None:
            stop = min(stop, trimmed + total - self.frames)
        frames = convert_frames(self._form, rollout.buffers.pixels[0].rows(trimmed, stop))
        with self._lock:  # the embeddings of a long video's past would add up
            timeline.forget(block)
        self.frames += stop - trimmed
        self.block += 1
        if self._clock:
            self._clock.add(stop - trimmed)
        info = BlockInfo(
            index=block,
            blocks=timeline.blocks,
            frames=self.frames,
            frames_total=total,
            read=read,
            seconds=time.perf_counter() - began,
            switch=timeline.switches.get(block),
            recovered=block in self._recovered,
            behind_seconds=self._clock.behind_seconds if self._clock else 0.0,
        )
        return Block(frames, latents, info)

    def _first_generated(self, scene: int) -> int:
        """Return the first block of a scene that is generated, counted in the video.

        Latents of a resumed render were generated as well, so that they do not tell.
        """
        is_restart = scene > 0 and not is_cut(self._timeline, scene)
        return max(self._start_blocks, scene + is_restart)

    def _restart(self, rollout: Rollout) -> None:
        """Begin the next rollout with the block that ended this one, as CausVid does.

        A cut that is followed by that block again, its first latent frame encoded from the last
        pixel frame it was decoded to. The pixel frames before that one stay as they are.
        """
        pixels, latents = rollout.buffers.pixels.host[0], rollout.buffers.latents.host[0]
        (latents[0],) = rollout.encode([pixels[TEMPORAL_FACTOR - 1]])
        before = pixels[: self.config.trimmed_frames].copy()
        rollout.begin_scene(self.block)  # which is not counted yet
        rollout.next_block(latents)
        pixels[: len(before)] = before


def stream_video(
    video: Video,
    on_block: Callable[[BlockInfo], None] | None = None,
    on_frames: Callable[[Block], None] | None = None,
) -> Iterator[np.ndarray]:
    """Yield the frames of a video block by block.

    Args:
        video: Makes blocks in the form "uint8" or "float32".
        on_block: Called after each block.
        on_frames: Called after each block as well, with its frames.

    Raises:
        RenderStopped: The video was stopped before its last block.
    """
    with video:
        for block in video:
            if on_block:
                on_block(block.info)
            if on_frames:
                on_frames(block)
            assert isinstance(block.frames, np.ndarray)
            yield block.frames
        if video.stopped:
            raise RenderStopped(
                f"stopped after {video.block} of {video.request.timeline.blocks} blocks"
            )
