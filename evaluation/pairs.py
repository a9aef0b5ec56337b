"""Pairs of a comparison: a prompt rendered and measured under a policy, or with a bundle.

Every finished pair is a video and, written after it, a JSON file of the same name, which holds a
key of all that went in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from packforcing import __version__
from packforcing.config import Policy
from packforcing.evaluation.ablations import make_rollout
from packforcing.evaluation.measures import Evaluation, evaluate_recall, evaluate_video
from packforcing.evaluation.prompt_sets import Prompt
from packforcing.files import write_file
from packforcing.presets import model_config
from packforcing.runtime.blocks import BlockInfo
from packforcing.runtime.bundle import MANIFEST
from packforcing.runtime.request import check_request
from packforcing.runtime.resume import discard
from packforcing.runtime.session import Session

RenderPair = Callable[[str, Callable[[float], None]], None]
"""Renders and measures a pair by its name; reports the share of it that is done."""
OnShare = Callable[[str, float], None]  # of a pair, by its name


class Job(NamedTuple):
    """A policy, or a bundle's name, and the number of a prompt; `video` is where its file lies."""

    policy: str
    number: int
    video: Path


class Pair(msgspec.Struct, frozen=True):
    """A prompt rendered under a policy."""

    policy: str
    number: int
    prompt: str
    seed: int
    video: str  # a path relative to the folder
    evaluation: Evaluation
    block_seconds: list[float]
    tokens_read: list[int]  # of context, by every block
    read: list[list[int]]  # the archived blocks that each block read
    host_peak: int  # bytes of resident memory, of the whole process


@dataclass(frozen=True)
class PairRenderer:
    """Renders and measures pairs, in this process or in others: it can be pickled.

    Attributes:
        jobs: The pairs, by the names of their videos without a suffix.
        bundles: By the name of what is compared.
        policies: By the same names.
        prompts: All of them.
        seconds: Length of every video.
        backend: Backend of the sessions.
        threads: CPU threads of the sessions; None: one for each core of the process.
    """

    jobs: Mapping[str, Job]
    bundles: Mapping[str, Path]
    policies: Mapping[str, Policy]
    prompts: Sequence[Prompt]
    seconds: float
    backend: str
    threads: int | None

    @contextmanager
    def open(self, device: int = 0) -> Iterator[RenderPair]:
        """Yield what renders a pair, unless it is finished, and writes its JSON file.

        Args:
            device: The GPU, among the visible ones.

        Raises:
            RenderLocked: Another process renders it.
            OutputError: A result cannot be written.
            PackForcingError: What `Session` and `evaluate_video` raise.
        """
        session, session_of = None, ""
        with ExitStack() as stack:

            def render(name: str, on_share: Callable[[float], None]) -> None:
                nonlocal session, session_of
                job = self.jobs[name]
                if finished_pair(job):
                    return
                if session is None or session_of != job.policy:
                    stack.close()
                    session = Session.open(
                        self.bundles[job.policy],
                        policy=self.policies[job.policy],
                        backend=self.backend,
                        threads=self.threads,
                        device=device,
                        make_rollout=make_rollout,
                    )
                    session_of = job.policy
                    stack.enter_context(session)
                pair = _render(session, job, self.prompts[job.number], self.seconds, on_share)
                write_file(job.video.with_suffix(".json"), encode_json(pair))

            yield render


def render_pairs(renderer: PairRenderer, on_share: OnShare) -> None:
    """Render all pairs in this process, one after the other."""
    with renderer.open() as render:
        for name in renderer.jobs:
            render(name, partial(on_share, name))


def _render(
    session: Session,
    job: Job,
    prompt: Prompt,
    seconds: float,
    on_share: Callable[[float], None],
) -> Pair:
    """Render and measure one pair; the video stands under its name when it is whole."""
    process, config = psutil.Process(), session.config
    blocks: list[BlockInfo] = []
    peak = 0

    def on_block(info: BlockInfo) -> None:
        nonlocal peak
        blocks.append(info)
        peak = max(peak, process.memory_info().rss)
        on_share(info.frames / session.config.frames(seconds) / 2)

    video = job.video
    discard(video)  # of a comparison that was interrupted: every block is to be measured
    timeline = check_request(config, prompt.followed(config), seconds, prompt.seed)
    session.render(timeline, seconds, video, prompt.seed, on_block=on_block)
    # the detectors are of the demo model's world
    words = prompt.text if session.manifest.config.name == model_config("demo").name else None

    def on_frame(done: int, total: int) -> None:
        on_share(0.5 + done / total / 2)

    if prompt.world:
        evaluation = evaluate_recall(video, prompt.world, [b.read for b in blocks], on_frame)
    else:
        evaluation = evaluate_video(video, words, on_frame)
    return Pair(
        policy=job.policy,
        number=job.number,
        prompt=prompt.text,
        seed=prompt.seed,
        video=f"{video.parent.name}/{video.name}",
        evaluation=evaluation,
        block_seconds=[round(block.seconds, 5) for block in blocks],
        tokens_read=[
            sum(map(len, config.policy.full_resolution_blocks(block.index))) * config.block_tokens
            + len(block.read) * config.compressed_tokens
            for block in blocks
        ],
        read=[block.read for block in blocks],
        host_peak=peak,
    )


def pair_key(bundle: Path, backend: str, policy: Policy, prompt: Prompt, seconds: float) -> str:
    """Of all that a pair depends on; the manifest holds the hash of every file of the bundle."""
    manifest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    content = prompt.content
    words = content if isinstance(content, str) else content.tobytes().hex()
    inputs = [__version__, manifest, backend, words, prompt.text, prompt.seed, float(seconds)]
    inputs += [msgspec.to_builtins(policy), *prompt.world]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]


def finished_pair(job: Job) -> Pair | None:
    """The result of an earlier call, if its video is there as well; None for a damaged file."""
    with suppress(OSError, msgspec.DecodeError):
        pair = msgspec.json.decode(job.video.with_suffix(".json").read_bytes(), type=Pair)
        if job.video.is_file():
            return pair
    return None


def encode_json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"
