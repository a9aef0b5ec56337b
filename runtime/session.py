"""Open a bundle and make videos with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from packforcing.config import Config, Policy
from packforcing.errors import BackendError, OutputError, RenderStopped
from packforcing.prompts import Prompts
from packforcing.runtime.allocations import memory_by_purpose
from packforcing.runtime.arguments import check_integer, check_path, check_type
from packforcing.runtime.backends import MAX_THREADS, Backend, open_backend
from packforcing.runtime.bundle import Manifest, read_manifest
from packforcing.runtime.encoder import bind_encoder, encode_start
from packforcing.runtime.render import RenderSummary, render_video
from packforcing.runtime.request import (
    VideoRequest,
    check_memory,
    check_request,
    check_seconds,
    check_seed,
    check_start,
)
from packforcing.runtime.resume import SNAPSHOT_SECONDS
from packforcing.runtime.rollout import Rollout
from packforcing.runtime.video import BlockInfo, Recorder, Video
from packforcing.sampler import StepOverrides

THREAD_BOUNDS = f"from 1 to {MAX_THREADS}, or None for one for each core"


class Session:
    """Makes videos with one bundle; use it as a context manager.

    It has what does not change while a video is made: weights, graphs and the device. What
    changes is in a `Video`.

    One video at a time: beginning another ends the one before, from whichever thread. Every
    method may be called from every thread, and `stop` from a signal handler too, unless something
    pauses the session; what they ask for happens between two blocks.

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
        make_rollout: Callable[[Config, Backend], Rollout] = Rollout,
    ) -> Session:
        """Check a bundle's files and load its graphs.

        Args:
            bundle: The bundle's folder.
            policy: Which history blocks read; None means the bundle's own.
            steps: Denoising steps in place of the bundle's own.
            threads: Of each graph on the CPU. None: one for each core of this process; a render
                that is resumed has as many as it began with.
            backend: One of `packforcing.runtime.backends.BACKENDS`.
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
            return open_backend(backend, Path(bundle), manifest, config, threads)

        opened = load(threads)
        session = cls(manifest, opened, policy=policy, steps=steps, make_rollout=make_rollout)
        session._load = None if threads else load
        return session

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
        """
        self.manifest, self.backend = manifest, backend
        self.config = _configure(manifest, policy, steps)
        self.rollout: Rollout | None = None
        self._make_rollout = make_rollout
        self._video: Video | None = None
        self._may_run, self._stopped = threading.Event(), False
        self._may_run.set()
        self._lock = threading.Lock()  # one block at a time, whichever thread asks for it
        self._closed = False
        self._load: Callable[[int], Backend] | None = None
        self._default_threads = backend.threads

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
        """Free graphs and buffers; safe to call twice. A video in the making ends with an error."""
        with self._lock:
            self.proceed()
            if not self._closed:
                self._closed, self.rollout, self._video = True, None, None
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
        with self._lock:
            self._require_open()
            if self._load is not None and threads != self.backend.threads:
                self.rollout, self._video = None, None
                self.backend.close()  # first, as two would not fit into memory
                self.backend.graphs.clear()
                self._closed = True  # unless they load
                self.backend = self._load(threads)
                self._closed = False

    def pause(self) -> None:
        """Begin no further block before `proceed` or `stop`."""
        self._may_run.clear()

    def proceed(self) -> None:
        """End a pause."""
        if not self._may_run.is_set():
            self._may_run.set()

    def stop(self) -> None:
        """Stop the current video after the current block; its consumer sees `RenderStopped`."""
        self._stopped = True
        self.proceed()

    def graph_seconds(self) -> dict[str, float]:
        """Return the time spent inside each graph since the session was opened, by name."""
        return {name: graph.seconds for name, graph in self.backend.graphs.items()}

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
            prompt: Words, where the model's text encoder is in the package; an embedding, float
                [T, text_dim] or what `packforcing.embeddings.load_embedding` returns; or a list
                of `Switch`, in which they change over time (`packforcing.prompts` has the rules).
            seconds: Length of the video.
            seed: Of the noise.
            start: An image or a clip that the video begins with, uint8 RGB [H, W, 3] or
                [T, H, W, 3]. Whole blocks of it are used; a shorter clip holds its last frame.
            on_block: Called after each block.

        Yields:
            Frames, uint8 RGB [n, H, W, 3].

        Raises:
            PromptError: A prompt or a switch cannot be followed.
            ConfigError: Length, seed or start frames are impossible, or memory is too small.
            RenderStopped: `stop` was called.
            BackendError: The session was closed, another video was begun, or a graph failed.
        """
        return self.stream_request(self._request(prompt, seconds, seed, start, on_block), on_block)

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
        checkpoint_seconds: float = SNAPSHOT_SECONDS,
    ) -> RenderSummary:
        """Render a video into a file; nothing stands under `path` before all of it is done.

        Until then, finished blocks are in a folder beside it, `path` with `.render` added
        (`packforcing.runtime.resume` has the layout). A render that was interrupted, for whatever
        reason, continues if it is asked for again with `resume`, and gives the same frames;
        without `resume` it is in the way.

        Args:
            prompt: As for `stream`, as are `seconds`, `seed`, `start` and `on_block`.
            seconds: Length of the video.
            path: .mp4 (H.264), .mkv (lossless FFV1), or a folder for PNG files.
            seed: Of the noise.
            start: An image or a clip that the video begins with.
            on_block: Called after each block.
            resume: Continue an interrupted render, if there is one.
            checkpoint_seconds: Seconds of video between two snapshots. Another number makes
                another encoding of the same frames.

        Raises:
            OutputError: The output cannot be written, or is being rendered.
            ResumeError: The unfinished render is damaged or of another request.
            PackForcingError: What `stream` raises.
        """
        check_path("cannot write", path, OutputError)
        request = self._request(prompt, seconds, seed, start, on_block)
        return render_video(
            self,
            request,
            path,
            on_block=on_block,
            resume=resume,
            checkpoint_seconds=checkpoint_seconds,
        )

    def _request(
        self,
        prompt: Prompts,
        seconds: float,
        seed: int,
        start: np.ndarray | None,
        on_block: Callable[[BlockInfo], None] | None,
    ) -> VideoRequest:
        """Check what a video is asked to be."""
        self._require_open()
        seconds, seed = check_seconds(self.config, seconds), check_seed(seed)
        check_type("on_block", on_block, Callable, "a function of a BlockInfo")
        timeline = check_request(self.config, prompt, seconds, seed)
        clip = None if start is None else check_start(self.config, start, timeline)
        check_memory(self.manifest.config, self.config.policy, timeline.blocks)
        self._stopped = False
        return VideoRequest(timeline, self.config.frames(seconds), seed, clip)

    def stream_request(
        self,
        request: VideoRequest,
        on_block: Callable[[BlockInfo], None] | None = None,
        recorder: Recorder | None = None,
    ) -> Iterator[np.ndarray]:
        """Make a video of a checked request, and yield the frames of each block.

        Args:
            request: What is asked for.
            on_block: Called after each block.
            recorder: Follows the video; called while no other video can begin.
        """
        with self._lock:
            self._require_open()
            video = self._video = self._begin(request, recorder)
        while not video.finished:
            self._may_run.wait()
            with self._lock:
                self._require_open()
                if video is not self._video:
                    raise BackendError("the session began another video meanwhile")
                if self._stopped:
                    raise RenderStopped(
                        f"stopped after {video.block} of {request.timeline.blocks} blocks"
                    )
                frames, info = video.next_block()
            if on_block:
                on_block(info)
            yield frames

    def _begin(self, request: VideoRequest, recorder: Recorder | None) -> Video:
        config, blocks = self.config, request.timeline.blocks
        graph = self.backend.graphs["vae_encoder"]
        start_latents = {}
        if request.start is not None:
            start_latents = dict(enumerate(encode_start(config, graph, request.start, blocks)))
        rollout = self._rollout_for(blocks)
        arrays = rollout.buffers.encoder
        encode = None if arrays is None else bind_encoder(graph, arrays)
        return Video(rollout, request, start_latents, encode=encode, recorder=recorder)

    def _rollout_for(self, blocks: int) -> Rollout:
        """Reuse the buffers from video to video; full history alone depends on the length."""
        policy = self.config.policy.fit_to_video(blocks, self.manifest.config.policy)
        if self.rollout is None or self.rollout.config.policy != policy:
            self.rollout, self._video = None, None  # free the old buffers first
            config = msgspec.structs.replace(self.config, policy=policy)
            try:
                self.rollout = self._make_rollout(config, self.backend)
            except MemoryError as error:
                needed_gb = sum(memory_by_purpose(config).values()) / 1e9
                raise BackendError(
                    f"not enough memory: the buffers need {needed_gb:.1f} GB"
                ) from error
        return self.rollout

    def _require_open(self) -> None:
        if self._closed:
            raise BackendError("the session is closed; open another one")


def _configure(manifest: Manifest, policy: Policy | None, steps: StepOverrides | None) -> Config:
    """Return a bundle's config with another policy and other denoising steps."""
    check_type("policy", policy, Policy, "a Policy, as packforcing.presets.policies() has them")
    check_type("steps", steps, StepOverrides, "StepOverrides of packforcing.sampler")
    config = steps.apply(manifest.config) if steps else manifest.config
    return msgspec.structs.replace(config, policy=policy) if policy else config
