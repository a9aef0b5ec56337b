"""A bundle, opened: prompts in, frames out."""

from __future__ import annotations

import hashlib
import math
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from packforcing.config import TEMPORAL_FACTOR, Config, Policy
from packforcing.errors import BackendError, ConfigError, RenderStopped
from packforcing.prompts import (
    History,
    Prompts,
    Switch,
    Timeline,
    plan_prompts,
    plan_switches,
)
from packforcing.runtime.backends import open_backend
from packforcing.runtime.buffers import IN_MEMORY, encoder_arrays
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.device import HostDevice
from packforcing.runtime.plan import LONGEST, archive_bytes, memory
from packforcing.runtime.resume import (
    SECONDS,
    RenderFolder,
    conclude,
    interval,
    render_folder,
)
from packforcing.runtime.rollout import Rollout, encoder


@dataclass(frozen=True)
class BlockInfo:
    """What `on_block` is told after each block."""

    index: int
    blocks: int
    frames: int  # delivered so far
    frames_total: int
    read: list[int]  # the archived blocks this block read
    seconds: float  # wall time of the block, without the consumer's
    switch: Switch | None  # the prompt that it is the first to follow


@dataclass(frozen=True)
class SwitchInfo:
    """A prompt, and when the video began to follow it."""

    block: int
    seconds: float  # of the video, at the block's first frame
    prompt: str  # empty for an embedding that does not say its words
    history: History


@dataclass(frozen=True)
class RenderSummary:
    """What `render` did."""

    frames: int
    blocks: int
    frames_resumed: int  # of `frames`, those of an earlier run's last checkpoint
    seconds_total: float
    seconds_graphs: dict[str, float]
    seconds_video: float
    archive_bytes: int
    prompts: list[SwitchInfo]


def check_request(config: Config, prompt: Prompts, seconds: float, seed: int) -> Timeline:
    """Check a request and encode its prompts, each once. Needs no graph.

    Args:
        config: Of the bundle.
        prompt: Words, where the model's text encoder is "words", an embedding, a schedule of
            them, or the result of an earlier call for the same video.
        seconds: Length of the video.
        seed: Of the noise.

    Returns:
        When the video follows which prompt. `Session.render` and `Session.stream` take it in
        place of the prompt.

    Raises:
        PromptError: A prompt or a switch cannot be followed.
        ConfigError: The length or the seed is impossible.
    """
    check_schedule(config, prompt, seconds, seed)
    return plan_prompts(prompt, config, config.frames(seconds))


def check_schedule(config: Config, prompt: Prompts, seconds: float, seed: int) -> None:
    """Check what `check_request` does, except the words of prompts. Needs no text encoder."""
    if not (math.isfinite(seconds) and 0 < seconds <= LONGEST and config.frames(seconds)):
        raise ConfigError(
            f"seconds must be above 0, at least one frame and at most {LONGEST:.0f}; "
            f"it is {seconds:g}"
        )
    if not 0 <= operator.index(seed) < 2**64:
        raise ConfigError(f"seed must be from 0 to 2^64 - 1; it is {seed}")
    plan_switches(prompt, config, config.frames(seconds))


def check_memory(config: Config, policy: Policy, blocks: int) -> None:
    """Raises `ConfigError` for what this machine cannot hold: a long video under full history.

    config: of the bundle. policy: that the video is to be made under.
    """
    config = msgspec.structs.replace(config, policy=policy.fit_to_video(blocks, config.policy))
    archive = min(archive_bytes(config, blocks), IN_MEMORY)
    needed = sum(memory(config).values()) + archive
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):  # elsewhere allocation itself fails
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > present:
            raise ConfigError(
                f"this video needs {needed / 1e9:.1f} GB under its policy, the machine has "
                f"{present / 1e9:.1f} GB; make it shorter or choose another policy"
            )


class Session:
    """Renders videos with one bundle; use it as a context manager.

    One video at a time: beginning another ends the one before, from whichever thread. Every
    method may be called from every thread, and `stop` from a signal's handler too, if nothing
    pauses the session; what they ask for happens between two blocks.
    """

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        policy: Policy | None = None,
        threads: int | None = None,
        backend: str = "onnxruntime",
    ) -> Session:
        """Checks a bundle's files and loads its graphs.

        policy: read the history differently from what the bundle says. threads: of each graph
        on the CPU, all cores by default. backend: one of `packforcing.runtime.backends.BACKENDS`.
        Raises `BundleError` or `BackendError`.
        """
        return cls(Path(bundle), policy, threads, backend)

    def __init__(
        self, directory: Path, policy: Policy | None, threads: int | None, backend: str
    ) -> None:
        self.manifest = read_manifest(directory)
        config = self.manifest.config
        self.config = msgspec.structs.replace(config, policy=policy) if policy else config
        self._backend = open_backend(backend, directory, self.manifest, self.config, threads)
        self._runs_on = f"{backend}, {threads or os.cpu_count()} threads"
        self._rollout: Rollout | None = None
        self._may_run, self._stopped = threading.Event(), False
        self._may_run.set()
        self._lock = threading.Lock()  # one block at a time, whichever thread asks for it
        self._videos = 0
        self._closed = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees graphs and buffers; safe to call twice. A video in work ends with an error."""
        with self._lock:
            self.proceed()
            if not self._closed:
                self._closed, self._rollout = True, None
                self._backend.close()
                self._backend.graphs.clear()

    def pause(self) -> None:
        """Lets no further block begin before `proceed` or `stop`."""
        self._may_run.clear()

    def proceed(self) -> None:
        """Ends a pause."""
        if not self._may_run.is_set():
            self._may_run.set()

    def stop(self) -> None:
        """Ends the video in work, after the block in work, with `RenderStopped`."""
        self._stopped = True
        self.proceed()

    def stream(
        self,
        prompt: Prompts,
        seconds: float,
        seed: int = 0,
        *,
        start: np.ndarray | None = None,
        on_block: Callable[[BlockInfo], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Frames of a video as they are made, uint8 [n, H, W, 3] per block, RGB.

        Exactly round(seconds x fps) frames come out; the first block, and the first after a cut,
        is shorter by the frames that stand for time before it.

        prompt: words, or for any model an embedding, float [T, text_dim] or what
        `packforcing.embeddings.load_embedding` gives; or a list of `Switch`, in which they change
        over time (`packforcing.prompts` has the rules). start: an image or a clip, uint8
        [H, W, 3] or [T, H, W, 3], that the video begins with (encoded, committed, not
        generated); whole blocks of it are used, a shorter one holds its last frame.

        Arguments are checked here and now, the work is done while iterating. Raises
        `PromptError` and `ConfigError`.
        """
        self._require_open()
        timeline = check_request(self.config, prompt, seconds, seed)
        clip = None if start is None else self._check_start(start, timeline)
        frames = self.config.frames(seconds)
        check_memory(self.manifest.config, self.config.policy, timeline.blocks)
        self._stopped = False
        return self._run(timeline, frames, seed, clip, on_block)

    def render(
        self,
        prompt: Prompts,
        seconds: float,
        path: str | Path,
        seed: int = 0,
        *,
        start: np.ndarray | None = None,
        on_block: Callable[[BlockInfo], None] | None = None,
        resume: bool = False,
        checkpoint_seconds: float = SECONDS,
    ) -> RenderSummary:
        """Renders a video into a file, block by block: .mp4 (h264), .mkv (lossless FFV1), or a
        directory of PNG frames. Nothing stands under `path` before all of it is done.

        Until then what is done is kept beside it, in `path` with `.render` added
        (`packforcing.runtime.resume` has the layout): a render that ended before its end, for
        whatever reason, goes on if it is asked for again with `resume`, and gives the frames it
        would have given; without `resume` it is in the way. checkpoint_seconds: of video from one
        checkpoint to the next; another number makes another encoding of the same frames.

        Raises what `stream` raises, `OutputError`, and `CheckpointError` if what is kept is
        damaged or another render.
        """
        from packforcing.runtime.video_files import check_output, join, open_video, segment_suffix

        self._require_open()
        self._stopped = False
        config = self.config
        timeline = check_request(config, prompt, seconds, seed)
        clip = None if start is None else self._check_start(start, timeline)
        total = config.frames(seconds)
        blocks = timeline.blocks
        check_memory(self.manifest.config, self.config.policy, blocks)
        began, in_graphs, in_video = time.perf_counter(), self._graph_seconds(), 0.0
        if not 0 < checkpoint_seconds <= LONGEST:
            raise ConfigError(
                f"checkpoint_seconds must be above 0 and at most {LONGEST:.0f}; "
                f"it is {checkpoint_seconds:g}"
            )
        every = interval(config, checkpoint_seconds)
        request = {
            "output": segment_suffix(path),
            "frames": str(total),
            "seed": str(seed),
            "prompts": _digest_prompts(timeline),
            "start": "none" if clip is None else _digest(clip),
            "interval": str(every),
            **self._identity(),
        }
        resumed = total
        if not (resume and conclude(path, request)):
            check_output(path, total, config.width, config.height)
            with render_folder(path, config, request, total, blocks, resume) as folder:
                first = folder.done.block
                stream = self._run(timeline, total, seed, clip, on_block, folder)
                try:
                    for block in range(first, blocks, every):
                        part = islice(stream, every)
                        fresh = next(part)  # the checkpoint before it is made before a file is open
                        segment = folder.segment(block), config.width, config.height, config.fps
                        with open_video(*segment, folder.then) as video:
                            for frames in chain((fresh,), part):
                                opened = time.perf_counter()
                                video.write(frames)
                                in_video += time.perf_counter() - opened
                except RenderStopped as error:
                    raise RenderStopped(f"{error}; {folder.then}") from None
                opened = time.perf_counter()
                segments = folder.segments(blocks)
                size = config.width, config.height, config.fps
                folder.place(join(segments, path, folder.path, *size, folder.then))
                in_video += time.perf_counter() - opened
                folder.remove()
            resumed = _frames_before(first, timeline, config)
        return RenderSummary(
            frames=total,
            blocks=blocks,
            frames_resumed=resumed,
            seconds_total=time.perf_counter() - began,
            seconds_graphs={
                name: after - in_graphs.get(name, 0.0)
                for name, after in self._graph_seconds().items()
            },
            seconds_video=in_video,
            archive_bytes=archive_bytes(config, blocks),
            prompts=_switches(timeline, config),
        )

    def _identity(self) -> dict[str, str]:
        """What decides about the frames beside what was asked for, by name."""
        import av
        import onnxruntime

        from packforcing import __version__

        return {
            "bundle": hashlib.sha256(msgspec.json.encode(self.manifest)).hexdigest(),
            "policy": msgspec.json.encode(self.config.policy).decode(),
            "runs on": f"{self._runs_on}, {self._backend.identity}",
            "made with": f"packforcing {__version__}, onnxruntime {onnxruntime.__version__}, "
            f"av {av.__version__}",
        }

    def _run(
        self,
        timeline: Timeline,
        frames_total: int,
        seed: int,
        clip: np.ndarray | None,
        on_block: Callable[[BlockInfo], None] | None,
        folder: RenderFolder | None = None,
    ) -> Iterator[np.ndarray]:
        blocks, switches = timeline.blocks, timeline.switches
        with self._lock:
            self._require_open()
            given = {} if clip is None else dict(enumerate(self._encode(clip, blocks)))
            rollout = self._rollout_for(blocks)
            first = folder.done.block if folder else 0
            delivered = _frames_before(first, timeline, self.config)
            latest = max(block for block in switches if block < max(1, first))
            rollout.begin(
                timeline.embeddings[latest], blocks, seed, folder.path if folder else None
            )
            if folder:
                folder.restore(rollout)
                noted = folder.noted()
                given |= noted
            self._videos += 1
            video = self._videos
        for index in range(first, blocks):
            self._may_run.wait()
            with self._lock:
                self._require_open()
                if video != self._videos:
                    raise BackendError("the session began another video meanwhile")
                if self._stopped:
                    raise RenderStopped(f"stopped after {index} of {blocks} blocks")
                if folder and index > first and index % folder.every == 0:
                    folder.save(rollout)
                began = time.perf_counter()
                switch = switches.get(index)
                if switch and index:
                    rollout.switch(timeline.embeddings[index], switch.history)
                skip = self.config.trimmed_frames if not rollout.cache.committed else 0
                rollout.next_block(given.get(index))
                read = [rollout.scene + mid for mid in rollout.read]
                if folder and index not in noted:
                    folder.note(index, rollout.buffers.latents.host[0])
                ends = rollout.cache.committed == self.config.policy.restart
                if ends and index + 1 < blocks and not _cut(timeline, index + 1):
                    rollout.restart()
                pixels = rollout.buffers.pixels.host[0]
                fresh = pixels[skip : skip + frames_total - delivered]
                frames = _to_bytes(fresh)
            delivered += len(frames)
            if on_block:
                seconds = time.perf_counter() - began
                on_block(BlockInfo(index, blocks, delivered, frames_total, read, seconds, switch))
            yield frames

    def _rollout_for(self, blocks: int) -> Rollout:
        """Bound buffers, kept from video to video; full history alone depends on the length."""
        policy = self.config.policy.fit_to_video(blocks, self.manifest.config.policy)
        if self._rollout is None or self._rollout.config.policy != policy:
            self._rollout = None  # free the old buffers first
            config = msgspec.structs.replace(self.config, policy=policy)
            try:
                self._rollout = Rollout(config, self._backend)
            except MemoryError as error:
                needed = sum(memory(config).values()) / 1e9
                raise BackendError(
                    f"not enough memory: the buffers need {needed:.1f} GB"
                ) from error
        return self._rollout

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError("the session is closed; open another one")

    def _check_start(self, start: np.ndarray, timeline: Timeline) -> np.ndarray:
        clip = start[None] if start.ndim == 3 else start
        size = (self.config.height, self.config.width, 3)
        if clip.ndim != 4 or not len(clip) or clip.shape[1:] != size or clip.dtype != np.uint8:
            raise ConfigError(
                f"start frames must be uint8 [T, {size[0]}, {size[1]}, 3]; "
                f"they are {start.dtype} {list(start.shape)}"
            )
        given = self._start_blocks(clip, timeline.blocks)
        for block, switch in timeline.switches.items():
            if switch.history == "cut" and block < given:
                raise ConfigError(
                    f"the cut at {switch.time:g} s falls into the start that the video begins "
                    f"with, {given} blocks: set it later"
                )
        return clip

    def _start_blocks(self, clip: np.ndarray, blocks: int) -> int:
        """How many blocks of a video start frames make up.

        As in Wan, the first latent frame stands for one pixel frame, each later one for four.
        """
        given = (1 + (len(clip) - 1) // TEMPORAL_FACTOR) // self.config.block_frames
        return min(max(1, given), blocks)

    def _encode(self, clip: np.ndarray, blocks: int) -> np.ndarray:
        """Start frames to clean latents of whole blocks, at most `blocks` of them,
        [blocks, B_f, C, h, w]."""
        config = self.config
        latents = self._start_blocks(clip, blocks) * config.block_frames
        frames = np.arange(latents * TEMPORAL_FACTOR) - config.trimmed_frames
        clip = clip[np.clip(frames, 0, len(clip) - 1)]
        groups = clip.reshape(latents, TEMPORAL_FACTOR, *clip.shape[1:]).transpose(0, 1, 4, 2, 3)
        encode = encoder(self._backend.graphs["vae_encoder"], encoder_arrays(config, HostDevice()))
        encoded = [latent.copy() for latent in encode(part / np.float32(255) for part in groups)]
        return np.stack(encoded).reshape(-1, config.block_frames, *encoded[0].shape)

    def _graph_seconds(self) -> dict[str, float]:
        return {name: graph.seconds for name, graph in self._backend.graphs.items()}


def _cut(timeline: Timeline, block: int) -> bool:
    """Whether a block begins a scene other than the first."""
    return block in timeline.switches and timeline.switches[block].history == "cut"


def _switches(timeline: Timeline, config: Config) -> list[SwitchInfo]:
    """When a video follows which prompt."""
    infos = []
    for block, switch in timeline.switches.items():
        seconds = _frames_before(block, timeline, config) / config.fps
        text = getattr(switch.prompt, "prompt", switch.prompt)  # the words of an embedding
        text = text if isinstance(text, str) else ""
        infos.append(SwitchInfo(block, seconds, text, switch.history))
    return infos


def _frames_before(block: int, timeline: Timeline, config: Config) -> int:
    """Frames of the blocks before one; the first of each scene are trimmed."""
    scenes = sum(
        first == 0 or _cut(timeline, first) for first in timeline.switches if first < block
    )
    return block * config.block_pixel_frames - scenes * config.trimmed_frames


def _digest_prompts(timeline: Timeline) -> str:
    lines = [
        f"{block} {switch.history} {_digest(timeline.embeddings[block])}"
        for block, switch in timeline.switches.items()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels float32 or float16 [n, 3, H, W] in 0..1 to uint8 [n, H, W, 3], rounded in float32."""
    scaled = pixels * np.float32(255)
    scaled += np.float32(0.5)
    planes = scaled.astype(np.uint8)
    frames = np.empty((len(pixels), *pixels.shape[2:], 3), np.uint8)
    for channel in range(3):  # three strided copies: numpy's transposed copy takes thrice as long
        frames[..., channel] = planes[:, channel]
    return frames
