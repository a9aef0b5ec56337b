"""Render and measure the same prompts and seeds under several policies, or by a bundle and what
was quantized from it.

Every finished pair of a policy, or bundle, and a prompt is a video and, written after it, a JSON
file of the same name, which holds a key of all that went in. A later call renders what has no such
file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import psutil

from packforcing import __version__
from packforcing.calibration.recipes import SNR_FILE, OutputLoss
from packforcing.config import Config, Policy, Precision
from packforcing.errors import BackendError, ConfigError, MissingDependency, OutputError
from packforcing.evaluation.ablations import make_rollout
from packforcing.evaluation.fidelity import Fidelity, video_fidelity
from packforcing.evaluation.intervals import Estimate, estimate_mean
from packforcing.evaluation.measures import Evaluation, Segment, Values, evaluate_video
from packforcing.evaluation.prompt_sets import Prompt
from packforcing.extras import optional_imports
from packforcing.files import write_file
from packforcing.presets import model_config
from packforcing.prompts import Timeline
from packforcing.runtime.allocations import archive_bytes, memory_by_purpose
from packforcing.runtime.blocks import BlockInfo
from packforcing.runtime.bundle import MANIFEST, read_manifest
from packforcing.runtime.plan import make_plan
from packforcing.runtime.request import check_memory, check_request
from packforcing.runtime.resume import discard
from packforcing.runtime.session import Session
from packforcing.runtime.video_files import check_output

END = 20.0  # seconds: what is left of a video at its end
CLOSE = 5.0  # seconds at the beginning in which frames of several bundles are compared
TARGET = "sm89"  # that device bytes are planned for; it has every dtype


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


class Costs(msgspec.Struct, frozen=True):
    """What a policy costs, in bytes by plan and as measured."""

    policy: Policy
    precision: Precision
    bundle: int  # bytes of its files
    buffers: int  # on the host, fixed
    archive: int  # on the host at the end of a video
    host_peak: int  # resident, the largest of its videos
    device: int  # on a GPU, by plan
    tokens_read: int  # by the last block
    block_seconds: float  # median
    last_block_seconds: float  # median over the last `END` seconds of the videos


class Row(msgspec.Struct, frozen=True):
    """A measure of a policy, and how far it is from the first policy's on the same prompts."""

    value: Estimate | None  # None where nothing was measured
    difference: Estimate | None  # None for the first policy itself


Summary = dict[str, dict[str, Row]]  # by policy, by measure


class Comparison(msgspec.Struct, frozen=True):
    """The result of a comparison; the first policy is the one that others are compared with."""

    bundle: str
    config: Config
    seconds: float
    costs: dict[str, Costs]
    whole: Summary  # over the whole videos
    end: Summary  # over their last `END` seconds
    pairs: list[Pair]
    # where bundles are compared, by name: their first `CLOSE` seconds against the first bundle's,
    # prompt by prompt, and dB of every quantized matrix, worst first
    fidelity: dict[str, list[Fidelity]]
    snr: dict[str, dict[str, float | None]]
    outputs: dict[str, dict[str, OutputLoss]]  # of their denoisers, against the first bundle's
    unmeasured: str  # why there are no `outputs`; "" where there are, or no other bundles


def run_comparison(
    bundle: Path,
    policies: Mapping[str, Policy],
    prompts: Sequence[Prompt],
    seconds: float,
    folder: Path,
    *,
    others: Mapping[str, Path] | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Render and measure what a folder lacks, and write compare.json there.

    Args:
        bundle: The bundle to render with.
        policies: Policies by name. The others are compared with the first.
        prompts: Prompts, each rendered under every policy.
        seconds: Length of every video.
        folder: Folder of the results; finished videos in it are used.
        others: Bundles of the same model in another precision, by name, under their own policy.
            Videos are lossless then, so that their frames can be compared.
        backend: Backend of the sessions.
        threads: CPU threads of the sessions; None: one for each core of this process.
        progress: Called with the number of frames done, and of all that were missing.

    Raises:
        ConfigError: A bundle is of another model, or a video does not fit into memory.
        OutputError: A result cannot be written.
        PackForcingError: What `Session` and `evaluate_video` raise.
    """
    config = read_manifest(bundle).config
    bundles = dict.fromkeys(policies, bundle)
    if others:
        clash = bundles.keys() & others.keys()
        if clash:
            raise ConfigError(f"two of what is compared are called {clash.pop()}: rename a folder")
        bundles |= others
        policies = {**policies, **{name: _alike(path, config) for name, path in others.items()}}
    suffix = ".mkv" if others else ".mp4"
    timelines = [check_request(config, prompt.content, seconds, prompt.seed) for prompt in prompts]
    videos = folder / "videos"
    try:
        videos.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {videos}: {error.strerror}") from error
    jobs = [
        Job(
            name,
            number,
            videos
            / f"{name}-{number:02}-{_key(bundles[name], backend, policy, prompt, seconds)}{suffix}",
        )
        for name, policy in policies.items()
        for number, prompt in enumerate(prompts)
    ]
    finished = {job: pair for job in jobs if (pair := _finished(job))}
    missing = [job for job in jobs if job not in finished]
    frames = config.frames(seconds)
    for name in dict.fromkeys(job.policy for job in missing):
        try:
            check_memory(read_manifest(bundles[name]).config, policies[name], config.blocks(frames))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    check_output(videos / f"all{suffix}", len(missing) * frames, config.width, config.height)
    done = itertools.count()
    for name, group in itertools.groupby(missing, lambda job: job.policy):
        policy = policies[name]
        with Session.open(
            bundles[name],
            policy=policy,
            backend=backend,
            threads=threads,
            make_rollout=make_rollout,
        ) as session:
            for job in group:
                on_share = partial(_report_share, progress, next(done), len(missing), frames)
                prompt, timeline = prompts[job.number], timelines[job.number]
                pair = _render(session, job, prompt, timeline, seconds, on_share)
                write_file(job.video.with_suffix(".json"), _json(pair))
                finished[job] = pair
    pairs = [finished[job] for job in jobs]
    outputs, unmeasured = _outputs(bundle, others) if others else ({}, "")
    result = Comparison(
        bundle=str(bundle),
        config=config,
        seconds=seconds,
        costs={
            name: _costs(
                bundles[name], policy, [pair for pair in pairs if pair.policy == name], seconds
            )
            for name, policy in policies.items()
        },
        whole=summarize(pairs, None),
        end=summarize(pairs, END),
        pairs=pairs,
        fidelity=_fidelity(folder, pairs, config) if others else {},
        snr={
            name: msgspec.json.decode((path / SNR_FILE).read_bytes(), type=dict[str, float | None])
            for name, path in bundles.items()
            if others and SNR_FILE in read_manifest(path).files
        },
        outputs=outputs,
        unmeasured=unmeasured,
    )
    write_file(folder / "compare.json", _json(result))
    return result


def _alike(bundle: Path, config: Config) -> Policy:
    """The policy of a bundle, if it is of the same model but for precision."""
    other = read_manifest(bundle).config
    if msgspec.structs.replace(other, precision=config.precision) != config:
        raise ConfigError(
            f"{bundle} differs from the bundle it is compared with in more than precision: "
            "name one that was exported or quantized from the same model, at the same size"
        )
    return other.policy


def _fidelity(folder: Path, pairs: Sequence[Pair], config: Config) -> dict[str, list[Fidelity]]:
    frames = round(CLOSE * config.fps)
    first = pairs[0].policy
    references = {pair.number: folder / pair.video for pair in pairs if pair.policy == first}
    by_bundle: dict[str, list[Fidelity]] = {}
    for pair in pairs:
        if pair.policy != first:
            close = video_fidelity(folder / pair.video, references[pair.number], frames)
            by_bundle.setdefault(pair.policy, []).append(close)
    return by_bundle


def _outputs(
    bundle: Path, others: Mapping[str, Path]
) -> tuple[dict[str, dict[str, OutputLoss]], str]:
    """The losses, or why there are none: the videos are rendered, so the rest is still shown."""
    try:
        with optional_imports("measuring the denoisers' outputs", "verify"):
            from packforcing.calibration.output_error import measure_output_losses

        return measure_output_losses(bundle, others), ""
    except (BackendError, MissingDependency) as error:
        return {}, str(error)


def _report_share(
    progress: Callable[[int, int], None] | None, done: int, jobs: int, frames: int, share: float
) -> None:
    if progress:
        progress(round((done + share) * frames), jobs * frames)


def _render(
    session: Session,
    job: Job,
    prompt: Prompt,
    timeline: Timeline,
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
    session.render(timeline, seconds, video, prompt.seed, on_block=on_block)
    # the detectors are of the demo model's world
    words = prompt.text if session.manifest.config.name == model_config("demo").name else None
    evaluation = evaluate_video(video, words, lambda done, total: on_share(0.5 + done / total / 2))
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


def _key(bundle: Path, backend: str, policy: Policy, prompt: Prompt, seconds: float) -> str:
    """Of all that a pair depends on; the manifest holds the hash of every file of the bundle."""
    manifest = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    content = prompt.content
    words = content if isinstance(content, str) else content.tobytes().hex()
    inputs = [__version__, manifest, backend, words, prompt.text, prompt.seed, float(seconds)]
    inputs.append(msgspec.to_builtins(policy))
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]


def _finished(job: Job) -> Pair | None:
    """The result of an earlier call, if its video is there as well; None for a damaged file."""
    with suppress(OSError, msgspec.DecodeError):
        pair = msgspec.json.decode(job.video.with_suffix(".json").read_bytes(), type=Pair)
        if job.video.is_file():
            return pair
    return None


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _costs(bundle: Path, policy: Policy, pairs: Sequence[Pair], seconds: float) -> Costs:
    manifest = read_manifest(bundle)
    config = manifest.config
    blocks = config.blocks(config.frames(seconds))
    config = config_for_video(config, policy, seconds)
    buffers = memory_by_purpose(config)
    tail = max(1, round(END * config.fps / config.block_pixel_frames))
    return Costs(
        policy=policy,
        precision=config.precision,
        bundle=sum(record.bytes for record in manifest.files.values()),
        buffers=sum(size for name, size in buffers.items() if name != "archive_per_block"),
        archive=archive_bytes(config, blocks),
        host_peak=max(pair.host_peak for pair in pairs),
        device=make_plan(config, TARGET, seconds=seconds).total,
        tokens_read=max(pair.tokens_read[-1] for pair in pairs),
        block_seconds=float(np.median([pair.block_seconds for pair in pairs])),
        last_block_seconds=float(np.median([pair.block_seconds[-tail:] for pair in pairs])),
    )


def config_for_video(config: Config, policy: Policy, seconds: float) -> Config:
    """Return the config whose buffers a video of this length takes under a policy."""
    policy = policy.fit_to_video(config.blocks(config.frames(seconds)), config.policy)
    return msgspec.structs.replace(config, policy=policy)


def summarize(pairs: Sequence[Pair], end: float | None) -> Summary:
    """Return means and differences by policy and measure.

    Args:
        pairs: Pairs of all policies; differences are from the first pair's policy.
        end: Seconds at the end of each video that count; None: all of it.
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    for pair in pairs:
        measured = (
            pair.evaluation.values if end is None else end_values(pair.evaluation.segments, end)
        )
        for name, value in measured.items():
            row = values.setdefault(pair.policy, {}).setdefault(name, {})
            if value is not None:
                row[pair.number] = value
    first = next(iter(values))
    summary: Summary = {}
    for policy, measures in values.items():
        summary[policy] = {}
        for name, row in measures.items():
            base = values[first][name]
            both = [row[number] - base[number] for number in row if number in base]
            summary[policy][name] = Row(
                estimate_mean(list(row.values())), None if policy == first else estimate_mean(both)
            )
    return summary


def end_values(segments: Sequence[Segment], seconds: float) -> Values:
    """Return mean values of the segments that reach into the last seconds.

    Args:
        segments: All segments of a video.
        seconds: Length of its end.
    """
    begin = segments[-1].stop - seconds
    last = [segment for segment in segments if segment.stop > max(begin, 0)]
    means: Values = {}
    for name in segments[-1].values:
        parts = [
            (segment.values[name], segment.values["returns"] if name == "loop_closure"
             else segment.stop - segment.start)
            for segment in last
        ]  # fmt: skip
        measured = [(value, weight) for value, weight in parts if value is not None and weight]
        if name == "returns":
            means[name] = sum(value for value, _ in measured)
        else:
            weights = sum(weight for _, weight in measured)
            means[name] = sum(v * w for v, w in measured) / weights if weights else None
    return means
