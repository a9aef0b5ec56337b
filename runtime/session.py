"""A bundle, opened: prompts in, frames out."""

from __future__ import annotations

import math
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from packforcing.config import TEMPORAL_FACTOR, Config, Policy
from packforcing.errors import BackendError, ConfigError
from packforcing.prompts import History, Prompts, Switch, Timeline, encode, plan_prompts
from packforcing.runtime.backend import open_backend
from packforcing.runtime.bundle import contract, encoder_state_shapes, read_manifest
from packforcing.runtime.device import HostDevice
from packforcing.runtime.plan import LONGEST, archive_bytes, memory
from packforcing.runtime.rollout import Rollout


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
    prompt: str  # empty for an embedding
    history: History


@dataclass(frozen=True)
class RenderSummary:
    """What `render` did."""

    frames: int
    blocks: int
    seconds_total: float
    seconds_graphs: dict[str, float]
    seconds_video: float
    archive_bytes: int
    prompts: list[SwitchInfo]


def check_request(config: Config, prompt: Prompts, seconds: float, seed: int) -> Timeline:
    """When a video like this follows which prompt, if it can be made.

    prompt: words, where the model has its encoder with it, an embedding, float [T, text_dim], or
    a schedule of them. Needs no graph, so it can come before a session is opened. Raises
    `PromptError` and `ConfigError`.
    """
    if not (math.isfinite(seconds) and 0 < seconds <= LONGEST and config.frames(seconds)):
        raise ConfigError(
            f"seconds must be above 0, at least one frame and at most {LONGEST:.0f}; "
            f"it is {seconds:g}"
        )
    if not 0 <= operator.index(seed) < 2**64:
        raise ConfigError(f"seed must be from 0 to 2^64 - 1; it is {seed}")
    return plan_prompts(prompt, config, config.frames(seconds))


class Session:
    """Renders videos with one bundle; use it as a context manager.

    One video at a time: beginning another ends the one before, from whichever thread.
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
        on the CPU, all cores by default. backend: one of `packforcing.runtime.backend.BACKENDS`.
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
        self._rollout: Rollout | None = None
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
        """Frees graphs and buffers; safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed, self._rollout = True, None
                self._backend.close()
                self._backend.graphs.clear()

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

        prompt: words, or for any model an embedding, float [T, text_dim], like
        `packforcing.embeddings.load_embedding` reads; or a list of `Switch`, in which they change
        over time (`packforcing.prompts` has the rules). start: an image or a clip, uint8
        [H, W, 3] or [T, H, W, 3], that the video begins with (encoded, committed, not
        generated); whole blocks of it are used, a shorter one holds its last frame.

        Arguments are checked here and now, the work is done while iterating. Raises
        `PromptError` and `ConfigError`.
        """
        self._require_open()
        timeline = check_request(self.config, prompt, seconds, seed)
        clip = None if start is None else self._check_start(start)
        frames = self.config.frames(seconds)
        self._check_memory(timeline.blocks)
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
    ) -> RenderSummary:
        """Renders a video into a file, block by block: .mp4 (h264), .mkv (lossless FFV1), or a
        directory of PNG frames. Nothing stands under `path` before all of it is done.

        Raises what `stream` raises, and `OutputError`.
        """
        from packforcing.runtime.video import check_output, open_video

        config = self.config
        began, in_graphs = time.perf_counter(), self._graph_seconds()
        in_video, written, blocks = 0.0, 0, 0
        prompts: list[SwitchInfo] = []

        def note(info: BlockInfo) -> None:
            if info.switch:
                text = info.switch.prompt if isinstance(info.switch.prompt, str) else ""
                prompts.append(
                    SwitchInfo(info.index, written / config.fps, text, info.switch.history)
                )
            if on_block:
                on_block(info)

        stream = self.stream(prompt, seconds, seed, start=start, on_block=note)
        check_output(path, config.frames(seconds), config.width, config.height)
        with open_video(path, config.width, config.height, config.fps) as video:
            for frames in stream:
                opened = time.perf_counter()
                video.write(frames)
                in_video += time.perf_counter() - opened
                written, blocks = written + len(frames), blocks + 1
        return RenderSummary(
            frames=written,
            blocks=blocks,
            seconds_total=time.perf_counter() - began,
            seconds_graphs={
                name: after - in_graphs.get(name, 0.0)
                for name, after in self._graph_seconds().items()
            },
            seconds_video=in_video,
            archive_bytes=archive_bytes(config, blocks),
            prompts=prompts,
        )

    def _run(
        self,
        timeline: Timeline,
        frames_total: int,
        seed: int,
        clip: np.ndarray | None,
        on_block: Callable[[BlockInfo], None] | None,
    ) -> Iterator[np.ndarray]:
        (blocks, switches), size = timeline, self.config.block_frames
        with self._lock:
            self._require_open()
            latents = [] if clip is None else self._encode(clip, blocks)
            cuts = [block for block, switch in switches.items() if switch.history == "cut"]
            if cuts and cuts[0] * size < len(latents):
                raise ConfigError(
                    f"the cut at {switches[cuts[0]].time:g} s falls into the start that the video "
                    f"begins with, {len(latents) // size} blocks: set it later"
                )
            rollout = self._rollout_for(blocks)
            rollout.begin(encode(switches[0].prompt, self.config), blocks, seed)
            self._videos += 1
            video = self._videos
        delivered = 0
        for index in range(blocks):
            with self._lock:
                self._require_open()
                if video != self._videos:
                    raise BackendError("the session began another video meanwhile")
                began = time.perf_counter()
                switch = switches.get(index)
                if switch and index:
                    rollout.switch(encode(switch.prompt, self.config), switch.history)
                read = sorted(rollout.scene + mid for mid in rollout.cache.mids)
                given = latents[index * size : (index + 1) * size]
                rollout.next_block(np.stack(given) if given else None)
                skip = self.config.trimmed_frames if index == rollout.scene else 0
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
        policy = bounded(self.config.policy, self.manifest.config.policy, blocks)
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

    def _check_memory(self, blocks: int) -> None:
        """Refuses what this machine cannot hold: a long video under full history."""
        config = msgspec.structs.replace(
            self.config, policy=bounded(self.config.policy, self.manifest.config.policy, blocks)
        )
        needed = sum(memory(config).values()) + archive_bytes(config, blocks)
        if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):  # elsewhere allocation itself fails
            present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if needed > present:
                raise ConfigError(
                    f"this video needs {needed / 1e9:.1f} GB under its policy, the machine has "
                    f"{present / 1e9:.1f} GB; make it shorter or choose another policy"
                )

    def _check_start(self, start: np.ndarray) -> np.ndarray:
        clip = start[None] if start.ndim == 3 else start
        size = (self.config.height, self.config.width, 3)
        if clip.ndim != 4 or not len(clip) or clip.shape[1:] != size or clip.dtype != np.uint8:
            raise ConfigError(
                f"start frames must be uint8 [T, {size[0]}, {size[1]}, 3]; "
                f"they are {start.dtype} {list(start.shape)}"
            )
        return clip

    def _encode(self, clip: np.ndarray, blocks: int) -> list[np.ndarray]:
        """Start frames to clean latents [C, h, w] of whole blocks, at most `blocks` of them."""
        config = self.config
        # As in Wan, the first latent frame stands for one pixel frame, each later one for four.
        given = (1 + (len(clip) - 1) // TEMPORAL_FACTOR) // config.block_frames
        latents = min(max(1, given), blocks) * config.block_frames
        frames = np.arange(latents * TEMPORAL_FACTOR) - config.trimmed_frames
        clip = clip[np.clip(frames, 0, len(clip) - 1)]
        spec, memory = contract(config)["vae_encoder"], HostDevice()
        arrays = {
            tensor.name: memory.allocate(
                "start", tuple(map(int, tensor.shape)), tensor.dtype, host=True
            )
            for tensor in (*spec.inputs, *spec.outputs)
        }
        frames, latent = arrays["frames"].host, arrays["latent"].host
        states = [
            (arrays[f"state.{i}"].host, arrays[f"new_state.{i}"].host)
            for i in range(len(encoder_state_shapes(config)))
        ]
        for state, _ in states:
            state[...] = 0
        encode = self._backend.graphs["vae_encoder"].bind(arrays)
        encoded = []
        for group in clip.reshape(latents, TEMPORAL_FACTOR, *clip.shape[1:]):
            frames[...] = group.transpose(0, 3, 1, 2) / np.float32(255)
            encode()
            encoded.append(latent[0].copy())
            for state, after in states:
                state[...] = after
        return encoded

    def _graph_seconds(self) -> dict[str, float]:
        return {name: graph.seconds for name, graph in self._backend.graphs.items()}


def bounded(policy: Policy, own: Policy, blocks: int) -> Policy:
    """Full history in as many slots as a video needs, or the model's `own` policy has; other
    policies as they are."""
    recent = min(policy.recent, max(own.recent, blocks - 1))
    return msgspec.structs.replace(policy, recent=recent)


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Pixels float32 or float16 [n, 3, H, W] in 0..1 to uint8 [n, H, W, 3], rounded in float32."""
    scaled = pixels * np.float32(255)
    scaled += np.float32(0.5)
    planes = scaled.astype(np.uint8)
    frames = np.empty((len(pixels), *pixels.shape[2:], 3), np.uint8)
    for channel in range(3):  # three strided copies: numpy's transposed copy takes thrice as long
        frames[..., channel] = planes[:, channel]
    return frames
