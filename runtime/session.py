"""Open a bundle and make videos with it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import msgspec
import numpy as np

from packforcing.config import Config, Policy
from packforcing.errors import BackendError, ConfigError, OutputError
from packforcing.prompts import Prompts
from packforcing.runtime.allocations import device_bytes, memory_by_purpose
from packforcing.runtime.arguments import (
    check_integer,
    check_number,
    check_path,
    check_type,
    show_value,
)
from packforcing.runtime.backends import (
    MAX_THREADS,
    Backend,
    check_backend,
    check_engine_records,
    open_backend,
)
from packforcing.runtime.blocks import Block, BlockInfo, FrameForm, StepInfo
from packforcing.runtime.bundle import Manifest, read_manifest
from packforcing.runtime.encoder import encode_start
from packforcing.runtime.hub import fetch_bundle
from packforcing.runtime.render import RenderSummary, render_video
from packforcing.runtime.request import VideoRequest, check_seconds, make_request
from packforcing.runtime.resume import SNAPSHOT_SECONDS
from packforcing.runtime.rollout import Rollout
from packforcing.runtime.video import LEAD, Video, stream_video
from packforcing.runtime.video_filters import NO_FILTERS, VideoFilters
from packforcing.sampler import StepOverrides

MAX_LEAD = 1_000_000
THREAD_BOUNDS = f"from 1 to {MAX_THREADS}, or None for one for each core"


class Session:
    """Makes videos with one bundle; use it as a context manager.

    It has what does not change while a video is made: weights, graphs and the device. What
    changes is in a `Video`. Several videos may be made at once, in one thread or in several: each
    has buffers of its own, and they make their blocks in turns. The buffers of a video that has
    ended serve the next one.

    Every method may be called from every thread, `stop` and `pause` from signal handlers too.

    Attributes:
        manifest: The bundle's.
        config: The bundle's, with the policy that videos are made under.
        backend: Runs the graphs; closed with the session.
        rollout: Buffers, cache and archive of the latest video, to inspect between two blocks.
            None before the first video.
    """

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        policy: Policy | None = None,
        steps: StepOverrides | None = None,
        threads: int | None = None,
        backend: str = "onnxruntime",
        device: int = 0,
        make_rollout: Callable[[Config, Backend], Rollout] = Rollout,
    ) -> Session:
        """Check a bundle's files and load its graphs.

        Args:
            bundle: The bundle's folder.
            policy: Which history blocks read; None means the bundle's own.
            steps: Denoising steps in place of the bundle's own.
            threads: Of each graph on the CPU. None: one for each core of this process, used in
                turns with other sessions; a render that is resumed has as many as it began with.
            backend: One of `packforcing.runtime.backends.BACKENDS`.
            device: The GPU, among the visible ones.
            make_rollout: Makes the rollout of a config on the backend.

        Raises:
            BundleError: The bundle is missing or damaged.
            BackendError: The backend cannot be used here.
            ConfigError: The steps are impossible.
        """
        manifest = read_manifest(bundle)
        config = _configure(manifest, policy, steps)
        if threads is not None:
            threads = check_integer("threads", threads, 1, MAX_THREADS, THREAD_BOUNDS)

        def load(threads: int | None) -> Backend:
            return open_backend(backend, Path(bundle), manifest, config, threads, device)

        opened = load(threads)
        session = cls(manifest, opened, policy=policy, steps=steps, make_rollout=make_rollout)
        session._load = None if threads else load
        return session

    @classmethod
    def from_pretrained(
        cls,
        repository: str,
        revision: str | None = None,
        *,
        policy: Policy | None = None,
        threads: int | None = None,
        backend: str = "onnxruntime",
        device: int = 0,
    ) -> Session:
        """Open a bundle of the Hugging Face hub, downloaded unless the hub's cache has it.

        Args:
            repository: Its name on the hub, as in "user/repo".
            revision: A branch, tag or commit; None: the newest.
            policy: As for `open`, as are `threads` and `device`.
            threads: CPU threads of each graph.
            backend: As for `open`; of the engines, only this backend's are downloaded, and those
                only if they run on this GPU.
            device: The GPU.

        Raises:
            FetchError: It cannot be downloaded.
            MissingDependency: huggingface_hub is not installed.
            PackForcingError: What `open` raises.
        """
        check_backend(backend)

        def check(folder: Path) -> None:
            config = _configure(read_manifest(folder), policy, None)
            check_engine_records(backend, folder, config, device)

        folder = fetch_bundle(repository, revision, backend, check)
        return cls.open(folder, policy=policy, threads=threads, backend=backend, device=device)

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        *,
        policy: Policy | None = None,
        steps: StepOverrides | None = None,
        make_rollout: Callable[[Config, Backend], Rollout] = Rollout,
    ) -> None:
        """Make videos with a backend that is open already.

        Args:
            manifest: Of the bundle whose graphs the backend has.
            backend: Runs the graphs. The session closes it.
            policy: Which history blocks read; None means the bundle's own.
            steps: Denoising steps in place of the bundle's own.
            make_rollout: Makes the rollout of a config on the backend.

        Raises:
            ConfigError: An argument is of another type, or the steps are impossible.
        """
        for value, kind, source in (
            (manifest, Manifest, "bundle.read_manifest"),
            (backend, Backend, "backends.open_backend"),
        ):
            if not isinstance(value, kind):
                name, place = kind.__name__.lower(), f"packforcing.runtime.{source}"
                raise ConfigError(f"{name} must be what {place} returns; it is {show_value(value)}")
        self.manifest, self.backend = manifest, backend
        self.config = _configure(manifest, policy, steps)
        self.rollout: Rollout | None = None
        self._make_rollout = make_rollout
        self._free: list[Rollout] = []  # of videos that have ended
        self._videos: tuple[weakref.ref[Video], ...] = ()  # replaced, never changed: see `stop`
        self._lock = threading.Lock()  # of `_videos`
        self._paused, self._closed = False, False
        self._load: Callable[[int | None], Backend] | None = None
        self._default_threads = backend.threads

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free graphs and buffers; safe to call twice. Videos in the making end with an error."""
        if not self._closed:
            self._closed, self._paused = True, False
            with self.backend.turns.turn(lambda: None):  # after the blocks in the making
                self.rollout = None
                self._free.clear()
                self.backend.close()
                self.backend.graphs.clear()

    def use_threads(self, threads: int | None) -> None:
        """Load the graphs again if videos are to be made with another number of CPU threads.

        Nothing happens where `open` was called with a number, or not at all. A video in the making
        ends with an error.

        Args:
            threads: Those that an unfinished render began with; None: one for each core.

        Raises:
            BundleError: The bundle was replaced or damaged meanwhile; the session is closed then.
            BackendError: The session is closed, or the backend cannot be used any more.
        """
        if threads is None:
            threads = self._default_threads
        if self._load is not None and threads != self.backend.threads:
            with self.backend.turns.turn(self.require_open):
                self.rollout = None
                self._free.clear()
                self.backend.close()  # first, as two would not fit into memory
                self.backend.graphs.clear()
                self._closed = True  # unless they load
            self.backend = self._load(None if threads == self._default_threads else threads)
            self._closed = False

    def pause(self) -> None:
        """Begin no further block of any video before `proceed`."""
        self._paused = True

    def proceed(self) -> None:
        """End a pause."""
        self._paused = False

    @property
    def paused(self) -> bool:
        return self._paused

    def stop(self) -> None:
        """Stop all videos before their next call of a graph."""
        for reference in self._videos:
            if (video := reference()) is not None:
                video.stop()

    def graph_seconds(self) -> dict[str, float]:
        """Return the time spent inside each graph since the session was opened, by name."""
        return {name: graph.seconds for name, graph in self.backend.graphs.items()}

    def begin(
        self,
        prompt: Prompts,
        seed: int = 0,
        *,
        seconds: float | None = None,
        start: np.ndarray | None = None,
        policy: Policy | None = None,
        frames: FrameForm = "uint8",
        lead: float | None = LEAD,
        archive_limit: int | str | None = None,
        on_step: Callable[[StepInfo], None] | None = None,
    ) -> Video:
        """Begin a video, to be made by iterating over it. Arguments are checked at once.

        Args:
            prompt: Words, where the model's text encoder is in the package; an embedding, float
                [T, text_dim] or what `packforcing.embeddings.load_embedding` returns; or a list
                of `Switch`, in which they change over time (`packforcing.prompts` has the rules).
            seed: Of the noise.
            seconds: Length of the video; None: until it is stopped.
            start: An image or a clip that the video begins with, uint8 RGB [H, W, 3] or
                [T, H, W, 3]. Whole blocks of it are used; a shorter clip holds its last frame.
            policy: Which history blocks read; None: the session's. Engines fit the session's alone.
            frames: The form of the frames, see `Block`.
            lead: Blocks that may be made ahead of a viewer who plays the video as it is made.
                None: make blocks as fast as possible.
            archive_limit: Blocks that the archive holds at most, or an amount of memory like
                "512 MiB" for them; when it is full, it thins out
                (`packforcing.selection.evict`). None: all; without an end, those that fit into 4
                GiB or a quarter of this machine's memory, whichever is less.
            on_step: Called after each denoising step.

        Raises:
            PromptError: A prompt or a switch cannot be followed.
            ConfigError: An argument is impossible, or memory is too small.
            BackendError: The session is closed, or its engines do not fit the policy.
        """
        self.require_open()
        if lead is not None:
            lead = check_number("lead", lead, MAX_LEAD, f"above 0 and at most {MAX_LEAD} blocks")
        if frames not in get_args(FrameForm):
            names = ", ".join(get_args(FrameForm))
            raise ConfigError(f"frames must be one of {names}; it is {show_value(frames)}")
        check_type("on_step", on_step, Callable, "a function of a StepInfo")
        own, policy = self.manifest.config, self._check_policy(policy)
        request = make_request(own, policy, prompt, seconds, seed, start, archive_limit)
        video = Video(self, request, form=frames, lead=lead, on_step=on_step)
        with self._lock:
            alive = (reference for reference in self._videos if reference() is not None)
            self._videos = (*alive, weakref.ref(video))
        return video

    def stream(
        self,
        prompt: Prompts,
        seconds: float,
        seed: int = 0,
        *,
        start: np.ndarray | None = None,
        on_block: Callable[[BlockInfo], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Make a video, and yield the frames of each block.

        Exactly round(seconds x fps) frames come out. The first block, and the first after a cut,
        is shorter by the frames that stand for time before it. Arguments are checked at once; the
        work is done while iterating.

        Args:
            prompt: As for `begin`, as are `seconds`, `seed` and `start`.
            seconds: Length of the video.
            seed: Of the noise.
            start: An image or a clip that the video begins with.
            on_block: Called after each block.

        Yields:
            Frames, uint8 RGB [n, H, W, 3].

        Raises:
            PromptError: A prompt or a switch cannot be followed.
            ConfigError: Length, seed or start frames are impossible, or memory is too small.
            RenderStopped: `stop` was called.
            BackendError: The session was closed, or a graph failed.
        """
        check_seconds(self.config, seconds)
        check_type("on_block", on_block, Callable, "a function of a BlockInfo")
        return stream_video(
            self.begin(prompt, seed, seconds=seconds, start=start, lead=None), on_block
        )

    def render(
        self,
        prompt: Prompts,
        seconds: float,
        path: str | Path,
        seed: int = 0,
        *,
        start: np.ndarray | None = None,
        policy: Policy | None = None,
        archive_limit: int | str | None = None,
        on_block: Callable[[BlockInfo], None] | None = None,
        on_frames: Callable[[Block], None] | None = None,
        resume: bool = False,
        checkpoint_seconds: float = SNAPSHOT_SECONDS,
        metadata: bool = True,
        filters: VideoFilters = NO_FILTERS,
    ) -> RenderSummary:
        """Render a video into a file; nothing stands under `path` before all of it is done.

        Until then, finished blocks are in a folder beside it, `path` with `.render` added
        (`packforcing.runtime.resume` has the layout). A render that was interrupted, for whatever
        reason, continues if it is asked for again with `resume`, and gives the same frames;
        without `resume` it is in the way.

        Args:
            prompt: As for `begin`, as are `seconds`, `seed`, `start`, `policy` and
                `archive_limit`.
            seconds: Length of the video.
            path: .mp4 or .mov (H.264), .webm (VP9), .gif, .mkv (lossless FFV1), a folder for PNG
                files, or - for fragmented MP4 on standard output, which cannot be resumed.
            seed: Of the noise.
            start: An image or a clip that the video begins with.
            policy: Which history blocks read; None: the session's.
            archive_limit: Blocks that the archive holds at most; None: all.
            on_block: Called after each block.
            on_frames: Called after each block as well, with its frames.
            resume: Continue an interrupted render, if there is one.
            checkpoint_seconds: Seconds of video between two snapshots. Another number makes
                another encoding of the same frames.
            metadata: Whether the file says how it was made (`packforcing.runtime.metadata`): its
                prompts, seed, policy and bundle, nothing of the machine or the time.
            filters: More frames per second, or larger ones, in the file. Until the video is whole,
                its segments are lossless and take more of the disk.

        Raises:
            OutputError: The output cannot be written, or is being rendered.
            ResumeError: The unfinished render is damaged or of another request.
            PackForcingError: What `stream` raises.
        """
        check_path("cannot write", path, OutputError)
        check_seconds(self.config, seconds)
        check_type("on_block", on_block, Callable, "a function of a BlockInfo")
        check_type("on_frames", on_frames, Callable, "a function of a Block")
        check_type("filters", filters, VideoFilters, "VideoFilters")
        video = self.begin(
            prompt,
            seed,
            seconds=seconds,
            start=start,
            policy=policy,
            lead=None,
            archive_limit=archive_limit,
        )
        return render_video(
            self,
            video,
            path,
            on_block=on_block,
            on_frames=on_frames,
            resume=resume,
            checkpoint_seconds=checkpoint_seconds,
            metadata=metadata,
            filters=filters,
        )

    def require_open(self) -> None:
        """Raise `BackendError` if the session is closed."""
        if self._closed:
            raise BackendError("the session is closed; open another one")

    def encode_start(self, request: VideoRequest, before_call: Callable[[], None]) -> np.ndarray:
        """Encode the frames that a video begins with.

        Args:
            request: Of the video.
            before_call: Called before each call of a graph; what it raises ends the encoding.

        Returns:
            Clean latents by block, float32 [blocks, B_f, C, h, w].
        """
        if request.start is None:
            return np.empty(0, np.float32)
        graph, blocks = self.backend.graphs["vae_encoder"], request.timeline.blocks
        return encode_start(self.config, graph, request.start, blocks, before_call)

    def _check_policy(self, policy: Policy | None) -> Policy:
        """Return the policy of a video; raise `BackendError` if the graphs do not fit it."""
        _check_policy_type(policy)
        own = self.config.policy
        if policy not in (None, own) and not self.backend.any_policy:
            raise BackendError(
                "engines fit the policy that their session was opened with: open another session "
                "for another policy, or use the backend onnxruntime"
            )
        return policy or own

    def lend_rollout(self, policy: Policy, blocks: int | None) -> Rollout:
        """Lend a rollout's buffers to a video; full history alone depends on the length.

        Args:
            policy: Of the video.
            blocks: Blocks of the video; None: no end.

        Raises:
            BackendError: Memory is too small for another one.
        """
        if blocks is not None:
            policy = policy.fit_to_video(blocks, self.manifest.config.policy)
        fitting = [rollout for rollout in self._free if rollout.config.policy == policy]
        self._free, self.rollout = fitting[1:], None  # frees the others before more is allocated
        if not fitting:
            config = msgspec.structs.replace(self.config, policy=policy)
            buffers = sum(device_bytes(config).values())
            self.backend.device.require(buffers, "the buffers of another video")
            try:
                fitting = [self._make_rollout(config, self.backend)]
            except MemoryError as error:
                needed_gb = sum(memory_by_purpose(config).values()) / 1e9
                raise BackendError(
                    f"not enough memory: the buffers need {needed_gb:.1f} GB"
                ) from error
        self.rollout = fitting[0]
        return self.rollout

    def return_rollout(self, rollout: Rollout) -> None:
        """Take a rollout back; it serves the next video, if the graphs are still the same."""
        if not self._closed and rollout.backend is self.backend:
            self._free.append(rollout)


def _check_policy_type(policy: object) -> None:
    """Raise `ConfigError` unless this is a policy or None."""
    check_type("policy", policy, Policy, "a Policy, as packforcing.presets.policies() has them")


def _configure(manifest: Manifest, policy: Policy | None, steps: StepOverrides | None) -> Config:
    """Return a bundle's config with another policy and other denoising steps."""
    _check_policy_type(policy)
    check_type("steps", steps, StepOverrides, "StepOverrides of packforcing.sampler")
    config = manifest.config
    if policy:
        config = msgspec.structs.replace(config, policy=policy)
    return steps.apply(config) if steps else config
