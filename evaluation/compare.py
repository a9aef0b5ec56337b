"""The same prompts and seeds under several policies, or by a bundle and what was quantised of it:
rendered, measured, compared.

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

from packforcing import __version__
from packforcing.app.reports.demo import save_page
from packforcing.calibration.recipes import SNR, Loss
from packforcing.config import Config, Policy, Precision
from packforcing.embeddings import SUFFIX, load_embedding
from packforcing.errors import BackendError, ConfigError, OutputError, PromptError
from packforcing.evaluation.fidelity import Fidelity, fidelity
from packforcing.evaluation.measures import Evaluation, Segment, Values, evaluate
from packforcing.presets import model_config
from packforcing.runtime.bundle import MANIFEST, read_manifest
from packforcing.runtime.plan import archive_bytes, make_plan, memory
from packforcing.runtime.resume import discard
from packforcing.runtime.session import (
    BlockInfo,
    Session,
    check_memory,
    check_request,
)
from packforcing.runtime.video_files import check_output
from packforcing.words import make_prompt, random_attributes, random_tour

END = 20.0  # seconds: what is left of a video at its end
CLOSE = 5.0  # seconds at the beginning over which videos of several bundles are told apart
RESAMPLES, LEVEL = 10_000, 0.95  # of the bootstrap
TARGET = "sm89"  # that device bytes are planned for; it has every number format


class Prompt(NamedTuple):
    """What is asked for: words to read and to show, and what the session is given."""

    text: str
    given: str | np.ndarray
    seed: int


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
    """What a policy takes, in bytes by plan and as measured."""

    policy: Policy
    precision: Precision
    bundle: int  # bytes of its files
    buffers: int  # on the host, fixed
    archive: int  # on the host at the end of a video
    host_peak: int  # resident, the largest of its videos
    device: int  # on a card, by plan
    tokens_read: int  # by the last block
    block_seconds: float  # median
    last_block_seconds: float  # median over the last `END` seconds of the videos


class Estimate(msgspec.Struct, frozen=True):
    """A mean over prompts, and where 95% of the bootstrap's means lie; None for one prompt."""

    mean: float
    low: float | None
    high: float | None
    prompts: int


class Row(msgspec.Struct, frozen=True):
    """A measure of a policy, and how far it is from the first policy's on the same prompts."""

    value: Estimate | None  # None where nothing was measured
    difference: Estimate | None  # None for the first policy itself


Summary = dict[str, dict[str, Row]]  # by policy, by measure


class Comparison(msgspec.Struct, frozen=True):
    """All that was found; the first policy is the one that others are compared with."""

    bundle: str
    config: Config
    seconds: float
    costs: dict[str, Costs]
    whole: Summary  # over the whole videos
    end: Summary  # over their last `END` seconds
    pairs: list[Pair]
    # where bundles are compared, by name: their first `CLOSE` seconds against the first bundle's,
    # prompt by prompt, and dB of every quantised matrix, worst first
    fidelity: dict[str, list[Fidelity]]
    snr: dict[str, dict[str, float | None]]
    outputs: dict[str, dict[str, Loss]]  # of their denoisers, against the first bundle's
    unmeasured: str  # why there are no `outputs`; "" where there are, or no other bundles


def compare(
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
    """Renders and measures what `folder` lacks, writes compare.json there, returns all of it.

    others: bundles of the same model in another precision, by name, under their own policy. Videos
    are lossless then, so that their frames can be told apart. progress is told how many frames are
    done, of how many that were missing. Raises what `Session` and `evaluate` raise, `ConfigError`
    for another model and `OutputError`.
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
    for prompt in prompts:
        check_request(config, prompt.given, seconds, prompt.seed)
    videos = folder / "videos"
    _make(videos)
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
            bundles[name], policy=policy, backend=backend, threads=threads
        ) as session:
            for job in group:
                tell = partial(_tell, progress, next(done), len(missing), frames)
                pair = _render(session, job, prompts[job.number], seconds, tell)
                save_page(job.video.with_suffix(".json"), _json(pair))
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
        whole=summarise(pairs, None),
        end=summarise(pairs, END),
        pairs=pairs,
        fidelity=_fidelity(folder, pairs, config) if others else {},
        snr={
            name: msgspec.json.decode((path / SNR).read_bytes(), type=dict[str, float | None])
            for name, path in bundles.items()
            if others and SNR in read_manifest(path).files
        },
        outputs=outputs,
        unmeasured=unmeasured,
    )
    save_page(folder / "compare.json", _json(result))
    return result


def _alike(bundle: Path, config: Config) -> Policy:
    """The policy of a bundle, if it is of the same model but for precision."""
    other = read_manifest(bundle).config
    if msgspec.structs.replace(other, precision=config.precision) != config:
        raise ConfigError(
            f"{bundle} differs from the bundle it is compared with in more than precision: "
            "name one that was exported or quantised from the same model, at the same size"
        )
    return other.policy


def _fidelity(folder: Path, pairs: Sequence[Pair], config: Config) -> dict[str, list[Fidelity]]:
    frames = round(CLOSE * config.fps)
    wanted = {pair.number: folder / pair.video for pair in pairs if pair.policy == pairs[0].policy}
    found: dict[str, list[Fidelity]] = {}
    for pair in pairs:
        if pair.policy != pairs[0].policy:
            close = fidelity(folder / pair.video, wanted[pair.number], frames)
            found.setdefault(pair.policy, []).append(close)
    return found


def _outputs(bundle: Path, others: Mapping[str, Path]) -> tuple[dict[str, dict[str, Loss]], str]:
    """The losses, or why there are none: of videos that are rendered nothing is to be withheld."""
    try:
        from packforcing.calibration.output_error import output_losses

        return output_losses(bundle, others), ""
    except ModuleNotFoundError as error:
        return {}, f"{error.name} is not installed: pip install '.[verify]' in the checkout"
    except BackendError as error:
        return {}, str(error)


def _tell(
    progress: Callable[[int, int], None] | None, done: int, jobs: int, frames: int, share: float
) -> None:
    if progress:
        progress(round((done + share) * frames), jobs * frames)


def _render(
    session: Session, job: Job, prompt: Prompt, seconds: float, tell: Callable[[float], None]
) -> Pair:
    """Renders and measures one pair; the video stands under its name when it is whole."""
    import psutil

    process, config = psutil.Process(), session.config
    blocks: list[BlockInfo] = []
    peak = 0

    def on_block(info: BlockInfo) -> None:
        nonlocal peak
        blocks.append(info)
        peak = max(peak, process.memory_info().rss)
        tell(info.frames / info.frames_total / 2)

    video = job.video
    discard(video)  # of a comparison that was interrupted: every block is to be measured
    session.render(prompt.given, seconds, video, prompt.seed, on_block=on_block)
    # the detectors are of the demo model's world
    words = prompt.text if session.manifest.config.name == model_config("demo").name else None
    found = evaluate(video, words, lambda done, total: tell(0.5 + done / total / 2))
    return Pair(
        policy=job.policy,
        number=job.number,
        prompt=prompt.text,
        seed=prompt.seed,
        video=f"{video.parent.name}/{video.name}",
        evaluation=found,
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
    given = prompt.given if isinstance(prompt.given, str) else prompt.given.tobytes().hex()
    inputs = [__version__, manifest, backend, given, prompt.text, prompt.seed, float(seconds)]
    inputs.append(msgspec.to_builtins(policy))
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]


def _finished(job: Job) -> Pair | None:
    """What an earlier call left, if its video is there as well; None for a damaged file too."""
    with suppress(OSError, msgspec.DecodeError):
        pair = msgspec.json.decode(job.video.with_suffix(".json").read_bytes(), type=Pair)
        if job.video.is_file():
            return pair
    return None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {folder}: {error.strerror}") from error


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=1).decode() + "\n"


def _costs(bundle: Path, policy: Policy, pairs: Sequence[Pair], seconds: float) -> Costs:
    manifest = read_manifest(bundle)
    config = manifest.config
    blocks = config.blocks(config.frames(seconds))
    kept = planned(config, policy, seconds)
    buffers = memory(kept)
    tail = max(1, round(END * config.fps / config.block_pixel_frames))
    return Costs(
        policy=policy,
        precision=config.precision,
        bundle=sum(record.bytes for record in manifest.files.values()),
        buffers=sum(size for name, size in buffers.items() if name != "archive_per_block"),
        archive=archive_bytes(kept, blocks),
        host_peak=max(pair.host_peak for pair in pairs),
        device=make_plan(kept, TARGET, seconds=seconds).total,
        tokens_read=max(pair.tokens_read[-1] for pair in pairs),
        block_seconds=float(np.median([pair.block_seconds for pair in pairs])),
        last_block_seconds=float(np.median([pair.block_seconds[-tail:] for pair in pairs])),
    )


def planned(config: Config, policy: Policy, seconds: float) -> Config:
    """The config whose buffers a video of this length takes under a policy."""
    kept = policy.fit_to_video(config.blocks(config.frames(seconds)), config.policy)
    return msgspec.structs.replace(config, policy=kept)


def summarise(pairs: Sequence[Pair], end: float | None) -> Summary:
    """Means and differences by policy and measure; `end` takes so many seconds of each video."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for pair in pairs:
        measured = pair.evaluation.values if end is None else last(pair.evaluation.segments, end)
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
                estimate(list(row.values())), None if policy == first else estimate(both)
            )
    return summary


def last(segments: Sequence[Segment], seconds: float) -> Values:
    """Mean values of the segments that reach into the last `seconds`."""
    begin = segments[-1].stop - seconds
    chosen = [segment for segment in segments if segment.stop > max(begin, 0)]
    means: Values = {}
    for name in segments[-1].values:
        parts = [
            (segment.values[name], segment.values["returns"] if name == "loop_closure"
             else segment.stop - segment.start)
            for segment in chosen
        ]  # fmt: skip
        known = [(value, weight) for value, weight in parts if value is not None and weight]
        if name == "returns":
            means[name] = sum(value for value, _ in known)
        else:
            weights = sum(weight for _, weight in known)
            means[name] = sum(v * w for v, w in known) / weights if weights else None
    return means


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95% interval by bootstrap over the values (percentiles, always the same draws)."""
    if not values:
        return None
    given = np.asarray(values, np.float64)
    if len(given) == 1:
        return Estimate(float(given[0]), None, None, 1)
    draws = np.random.default_rng(0).integers(len(given), size=(RESAMPLES, len(given)))
    low, high = np.quantile(given[draws].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(given.mean()), float(low), float(high), len(given))


def draw_prompts(config: Config, count: int, seed: int) -> list[Prompt]:
    """Prompts for the demo model, every second one a tour; prompt i has the seed `seed` + i."""
    if config.text_encoder != "words":
        raise ConfigError(
            f"prompts are made up for the demo model alone: give --prompts a file with one prompt "
            f"for {config.name} in a line"
        )
    rng = np.random.Generator(np.random.Philox(key=seed % 2**64))  # others are refused later
    words = [(random_tour if number % 2 else random_attributes)(rng) for number in range(count)]
    texts = [make_prompt(**given) for given in words]
    return [Prompt(text, text, seed + number) for number, text in enumerate(texts)]


def read_prompts(path: Path, seed: int) -> list[Prompt]:
    """A prompt in each line; one that ends in .safetensors names a file of an embedding, from the
    folder of this file. Raises `PromptError`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise PromptError(f"cannot read prompts from {path}: {reason}") from error
    prompts: list[Prompt] = []
    for text in filter(None, map(str.strip, lines)):
        given: str | np.ndarray = text
        if text.endswith(SUFFIX):
            embedding = load_embedding(path.parent / text)
            text, given = embedding.prompt or text, embedding.text
        prompts.append(Prompt(text, given, seed + len(prompts)))
    if not prompts:
        raise PromptError(f"{path} holds no prompt: write one in each line")
    return prompts
