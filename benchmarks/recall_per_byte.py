"""Draw recall against the bytes of context that a policy reads.

    python -m benchmarks.recall_per_byte --out FOLDER [--worlds 48] [--others 12] [--seconds 60]

Renders worlds of the demo model (`packforcing.evaluation.recall`): under PackForcing, full history,
a window with a sink and random selection on all worlds, and under settings that vary one thing each
on `--others` of them. Prints tables and writes recall.json, recall.md and recall.png into the
folder, where finished worlds are used again.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import msgspec
import numpy as np
from scipy.stats import bootstrap

from benchmarks.figure_values import interval, table
from packforcing.app.cli.progress import count_meter
from packforcing.config import Config, Policy
from packforcing.evaluation import demo_judge
from packforcing.evaluation.ablations import make_rollout
from packforcing.evaluation.intervals import RESAMPLES, Estimate, estimate_mean
from packforcing.evaluation.prompt_sets import draw_worlds
from packforcing.evaluation.recall import CHANCE, JUDGED, judge_recall
from packforcing.files import write_file
from packforcing.machine import cpu_cores
from packforcing.presets import policies
from packforcing.prompts import History
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.allocations import token_bytes
from packforcing.runtime.archive import Archive
from packforcing.runtime.backends import Backend
from packforcing.runtime.bundle import MANIFEST, read_manifest
from packforcing.runtime.rollout import Rollout

MIDS = (1, 2, 12, 24)  # blocks; the model's own number is a setting of its own
WINDOWS = (4, 8, 24)  # recent blocks
CURVES = ("full history", "PackForcing", "random mid blocks", "sink and window")  # that are drawn
COMPARED = 4  # settings on all worlds
AVERAGES = (2, 1)  # tokens of a compressed block
LIMITS = (32, 16, 8)  # blocks of an archive


class Setting(NamedTuple):
    """What worlds are rendered under.

    Attributes:
        curve: Settings of one name are points of a curve.
        point: Which one.
        policy: Which history blocks read.
        tokens: Of a compressed block; fewer than the model's are averages of them.
        limit: Blocks of the archive; None: all.
        switches: Whether the first block after a prompt switch selects once more.
    """

    curve: str
    point: str
    policy: Policy
    tokens: int
    limit: int | None = None
    switches: bool = True


def settings(config: Config) -> tuple[list[Setting], list[Setting]]:
    """Return the settings that are compared, with the model's own as the first; and the others."""
    named, tokens = policies(config), config.compressed_tokens
    own, window = named["packforcing"], named["sink-window"]
    change = msgspec.structs.replace

    def setting(curve: str, point: str, policy: Policy, **other: int | bool | None) -> Setting:
        return Setting(curve, point, policy, **{"tokens": tokens, **other})  # type: ignore[arg-type]

    compared = [
        setting("PackForcing", f"{own.mid} mid blocks", own),
        setting("full history", "", named["full-history"]),
        setting("sink and window", f"{window.recent} recent", window),
        setting("random mid blocks", f"{own.mid} mid blocks", change(own, selection="random")),
    ]
    others = [
        *(setting("PackForcing", f"{n} mid blocks", change(own, mid=n)) for n in MIDS),
        *(setting("random mid blocks", f"{n} mid blocks", change(own, mid=n, selection="random"))
          for n in MIDS if n > own.mid),
        *(setting("sink and window", f"{n} recent", change(window, recent=n)) for n in WINDOWS),
        setting("affinity, at the commit alone", "", own, switches=False),
        setting("likeness", "", change(own, selection="likeness")),
        setting("newest blocks", "", change(own, selection="recency")),
        *(setting("tokens averaged", f"{n} of {tokens}", own, tokens=n) for n in AVERAGES),
        *(setting("archive with a limit", f"{n} blocks", own, limit=n) for n in LIMITS),
    ]  # fmt: skip
    return compared, others


class Result(msgspec.Struct, frozen=True):
    """A world under a setting.

    Attributes:
        recall: Share of the frames of its returns that show the right ground; None where no place
            was shown rightly before.
        retrieved: Share of its returns that read a block of the place.
        context_bytes: Keys and values that its last block reads.
    """

    recall: float | None
    retrieved: float
    context_bytes: int


class Point(msgspec.Struct, frozen=True):
    """A setting's results. `below` is full history less the setting, world by world."""

    curve: str
    point: str
    context_bytes: int
    recall: Estimate | None
    below: Estimate | None
    retrieved: Estimate | None


class Findings(msgspec.Struct, frozen=True):
    """What the benchmark finds.

    Attributes:
        above: PackForcing less each other setting on the same worlds, of those compared.
        way: How much of the way from sink and window to full history PackForcing goes.
    """

    points: list[Point]
    above: dict[str, Estimate | None]
    way: Estimate


class AveragedArchive(Archive):
    """Gives compressed blocks whose tokens are means over groups of them."""

    tokens: int

    def get(self, block: int) -> np.ndarray:
        stored = super().get(block)
        groups = stored.reshape(*stored.shape[:-2], self.tokens, -1, stored.shape[-1])
        means = np.broadcast_to(groups.mean(-2, dtype=np.float32, keepdims=True), groups.shape)
        return means.reshape(stored.shape).astype(stored.dtype)


class Job(NamedTuple):
    """A world to render under a setting, and the file of its result."""

    setting: Setting
    bundle: Path
    number: int
    seconds: float
    file: Path


def rollout_of(setting: Setting) -> Callable[[Config, Backend], Rollout]:
    """Return what makes the rollouts of a setting."""

    class Changed(Rollout):
        def begin(self, *args: Any, **kwargs: Any) -> None:
            super().begin(*args, **kwargs)
            if setting.tokens < self.config.compressed_tokens:
                self.archive.__class__ = AveragedArchive
                self.archive.tokens = setting.tokens  # type: ignore[attr-defined]

        def switch(self, text: np.ndarray, history: History) -> None:
            super().switch(text, history)
            self._switched = setting.switches

    return make_rollout if setting.policy.selection == "likeness" else Changed


def render(job: Job) -> None:
    """Render and judge a world, unless its file is there."""
    setting = job.setting
    with Session.open(job.bundle, threads=1, make_rollout=rollout_of(setting)) as session:
        config = session.config
        (prompt,) = draw_worlds(config, 1, job.number, job.seconds)
        grounds, read = list[str](), list[list[int]]()
        video = session.begin(
            prompt.followed(config), prompt.seed, seconds=job.seconds, lead=None,
            archive_limit=setting.limit, policy=setting.policy,
        )  # fmt: skip
        for block in video:
            read.append(block.info.read)
            grounds += [demo_judge.read_scene(frame).ground for frame in block.frames]
    returns = judge_recall(config, prompt.world, grounds, read)
    shares = [visit.share for visit in returns if visit.scored]
    whole = sum(map(len, setting.policy.full_resolution_blocks(len(read) - 1)))
    tokens = whole * config.block_tokens + len(read[-1]) * setting.tokens
    result = Result(
        float(np.mean(shares)) if shares else None,
        float(np.mean([visit.retrieved for visit in returns])),
        tokens * token_bytes(config),
    )
    write_file(job.file, msgspec.json.encode(result))


def measure(
    folder: Path, chosen: Mapping[Setting, tuple[Path, int]], seconds: float, seed: int
) -> dict[Setting, list[Result]]:
    """Render what is missing, a process per core, and return the results of all settings.

    Args:
        folder: Of the results.
        chosen: Bundle and number of worlds of each setting.
        seconds: Length of the videos.
        seed: Number of the first world.
    """
    jobs: dict[Setting, list[Job]] = {}
    for setting, (bundle, worlds) in chosen.items():
        inputs = [msgspec.json.encode(setting), (bundle / MANIFEST).read_bytes(), b"%f" % seconds]
        key = hashlib.sha256(b"".join(inputs)).hexdigest()[:12]
        jobs[setting] = [
            Job(setting, bundle, number, seconds, folder / "worlds" / f"{key}-{number}.json")
            for number in range(seed, seed + worlds)
        ]
    (folder / "worlds").mkdir(parents=True, exist_ok=True)
    missing = [job for each in jobs.values() for job in each if not job.file.exists()]
    missing.sort(key=lambda job: job.number)  # a run that is interrupted has whole worlds
    context = multiprocessing.get_context("spawn")
    with (
        count_meter("recall", "worlds", quiet=False) as on_world,
        ProcessPoolExecutor(cpu_cores(), context) as pool,
    ):
        for number, done in enumerate(as_completed([pool.submit(render, job) for job in missing])):
            done.result()
            on_world(number + 1, len(missing))
    return {
        setting: [msgspec.json.decode(job.file.read_bytes(), type=Result) for job in each]
        for setting, each in jobs.items()
    }


def find(results: Mapping[Setting, list[Result]]) -> Findings:
    """Estimate what the results show; the first settings are those of `settings`."""
    own, full, window, *_ = compared = list(results)[:COMPARED]
    points = [
        Point(
            setting.curve, setting.point, each[0].context_bytes,
            estimate_mean([result.recall for result in each if result.recall is not None]),
            estimate_mean(differences(results[full], each)),
            estimate_mean([result.retrieved for result in each]),
        )
        for setting, each in results.items()
    ]  # fmt: skip
    above = {
        setting.curve: estimate_mean(differences(results[own], results[setting]))
        for setting in compared[1:]
    }
    return Findings(points, above, share_of_way(*(results[s] for s in (own, window, full))))


def differences(some: Sequence[Result], others: Sequence[Result]) -> list[float]:
    """Return the recall of some less that of others, of the worlds that both have."""
    return [one - other for one, other in zip(*_recalls(some, others))]


def share_of_way(own: list[Result], low: list[Result], high: list[Result]) -> Estimate:
    """Estimate how much of the way between two mean recalls a third one goes."""

    def ratio(mine: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
        return float((mine.mean() - lower.mean()) / (upper.mean() - lower.mean()))

    recalls = _recalls(own, low, high)
    interval = bootstrap(
        recalls, ratio, paired=True, vectorized=False, method="percentile", n_resamples=RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    count = len(recalls[0])
    return Estimate(ratio(*recalls), float(interval.low), float(interval.high), count)


def _recalls(*results: Sequence[Result]) -> np.ndarray:
    """Recalls of the worlds that all of them have, [results, worlds]."""
    rows = [[result.recall for result in row] for row in zip(*results)]
    return np.array([row for row in rows if None not in row], float).reshape(-1, len(results)).T


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw recall with its intervals against kB of context."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for curve in CURVES:
        known = sorted(
            (p.context_bytes / 1e3, p.recall.mean, p.recall.low, p.recall.high)
            for p in points if p.curve == curve and p.recall
        )  # fmt: skip
        sizes, means, lows, highs = zip(*known)
        (line,) = axes.plot(sizes, means, marker="o", label=curve)
        for size, low, high in zip(sizes, lows, highs):
            axes.plot([size, size], [low, high], color=line.get_color(), alpha=0.5)
    axes.axhline(CHANCE, color="gray", linestyle=":", label="a guess")
    axes.set(
        xscale="log", xlabel="keys and values that a block reads, kB", ylabel="recall on return",
        ylim=(0, 1),
    )  # fmt: skip
    axes.legend()
    figure.savefig(path, dpi=150)


def tables(findings: Findings) -> Iterator[str]:
    """Yield the tables in Markdown."""
    rows = [
        [f"{p.curve}, {p.point}" if p.point else p.curve, f"{p.context_bytes / 1e3:,.0f}",
         interval(p.recall), interval(p.below), interval(p.retrieved)] for p in findings.points
    ]  # fmt: skip
    yield table(["", "kB", "recall", "below full history", "retrieved"], rows)
    yield table(
        ["PackForcing", ""],
        [
            *([f"above {name}", interval(value)] for name, value in findings.above.items()),
            ["of the way from sink and window to full history", interval(findings.way)],
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", type=int, default=JUDGED, help="of those compared, 2 or more")
    parser.add_argument("--others", type=int, default=12, help="of the other settings; 0: none")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="number of the first world")
    parser.add_argument("--with", type=Path, action="append", default=[], dest="quantized",
                        metavar="BUNDLE", help="the demo with an 8-bit cache")  # fmt: skip
    args = parser.parse_args()
    bundle = demo_bundle()
    compared, others = settings(read_manifest(bundle).config)
    chosen = {setting: (bundle, args.worlds) for setting in compared}
    if args.others:
        chosen |= {setting: (bundle, args.others) for setting in others}
        for path in args.quantized:
            name = f"{read_manifest(path).config.precision.cache} cache"
            chosen[compared[0]._replace(curve=name, point="")] = path, args.others
    findings = find(measure(args.out, chosen, args.seconds, args.seed))
    text = "\n\n".join(tables(findings))
    write_file(args.out / "recall.json", msgspec.json.format(msgspec.json.encode(findings)))
    write_file(args.out / "recall.md", text.encode())
    draw(findings.points, args.out / "recall.png")
    print(text)


if __name__ == "__main__":
    main()
