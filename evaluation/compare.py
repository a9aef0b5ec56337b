"""Render and measure the same prompts and seeds under several policies, or by a bundle and what
was quantized from it.

A later call renders the pairs of a policy, or bundle, and a prompt that are not finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from packforcing.calibration.recipes import SNR_FILE, OutputLoss
from packforcing.config import Config, Policy, Precision
from packforcing.errors import BackendError, ConfigError, MissingDependency, OutputError
from packforcing.evaluation.fidelity import Fidelity, video_fidelity
from packforcing.evaluation.intervals import Estimate, estimate_mean
from packforcing.evaluation.measures import COUNTS, WEIGHTS, Segment, Values
from packforcing.evaluation.pairs import (
    Job,
    OnShare,
    Pair,
    PairRenderer,
    encode_json,
    finished_pair,
    pair_key,
    render_pairs,
)
from packforcing.evaluation.prompt_sets import Prompt
from packforcing.extras import optional_imports
from packforcing.files import write_file
from packforcing.runtime.allocations import archive_bytes, memory_by_purpose
from packforcing.runtime.backends import ENGINE_BACKENDS
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.plan import make_plan
from packforcing.runtime.request import check_memory, check_request
from packforcing.runtime.video_files import check_output

END = 20.0  # seconds: what is left of a video at its end
CLOSE = 5.0  # seconds at the beginning in which frames of several bundles are compared
TARGET = "sm89"  # that device bytes are planned for; it has every dtype


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
    render: Callable[[PairRenderer, OnShare], None] = render_pairs,
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
        render: Renders all pairs of a renderer, wherever it likes; called with what takes the name
            of a pair and the share of it that is done.

    Raises:
        ConfigError: A bundle is of another model, its engines do not fit a policy, or a video does
            not fit into memory.
        OutputError: A result cannot be written.
        PackForcingError: What `Session` and `evaluate_video` raise.
    """
    config = read_manifest(bundle).config
    if backend in ENGINE_BACKENDS:
        for name, policy in policies.items():
            if (
                msgspec.structs.replace(config, policy=policy).context_tokens
                != config.context_tokens
            ):
                raise ConfigError(
                    f"engines fit contexts of the size of the bundle's own, {config.policy}: leave "
                    f"out the policy {name}, or compare with the backend onnxruntime"
                )
    bundles = dict.fromkeys(policies, bundle)
    if others:
        clash = bundles.keys() & others.keys()
        if clash:
            raise ConfigError(f"two of what is compared are called {clash.pop()}: rename a folder")
        bundles |= others
        policies = {**policies, **{name: _alike(path, config) for name, path in others.items()}}
    suffix = ".mkv" if others else ".mp4"
    for prompt in prompts:
        check_request(config, prompt.followed(config), seconds, prompt.seed)
    videos = folder / "videos"
    try:
        videos.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {videos}: {error.strerror}") from error
    keys = {
        (name, number): pair_key(bundles[name], backend, policy, prompt, seconds)
        for name, policy in policies.items()
        for number, prompt in enumerate(prompts)
    }
    jobs = [
        Job(name, number, videos / f"{name}-{number:02}-{key}{suffix}")
        for (name, number), key in keys.items()
    ]
    missing = [job for job in jobs if not finished_pair(job)]
    frames = config.frames(seconds)
    for name in dict.fromkeys(job.policy for job in missing):
        try:
            check_memory(read_manifest(bundles[name]).config, policies[name], config.blocks(frames))
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    check_output(videos / f"all{suffix}", len(missing) * frames, config.width, config.height)
    shares = dict.fromkeys((job.video.stem for job in missing), 0.0)

    def on_share(name: str, share: float) -> None:
        shares[name] = share
        if progress:
            progress(round(sum(shares.values()) * frames), len(missing) * frames)

    if missing:
        render(
            PairRenderer(
                {job.video.stem: job for job in missing},
                bundles, policies, prompts, seconds, backend, threads,
            ),
            on_share,
        )  # fmt: skip
    pairs = [pair for job in jobs if (pair := finished_pair(job))]
    if len(pairs) < len(jobs):
        raise OutputError(f"files of {videos} disappear while they are compared")
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
    write_file(folder / "compare.json", encode_json(result))
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
            (segment.values[name], segment.values[WEIGHTS[name]] if name in WEIGHTS
             else segment.stop - segment.start)
            for segment in last
        ]  # fmt: skip
        measured = [(value, weight) for value, weight in parts if value is not None and weight]
        if name in COUNTS:
            means[name] = sum(value for value, _ in measured)
        else:
            weights = sum(weight for _, weight in measured)
            means[name] = sum(v * w for v, w in measured) / weights if weights else None
    return means
