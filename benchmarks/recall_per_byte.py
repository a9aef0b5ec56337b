"""Draw recall against the bytes of context that a policy reads.

    python -m benchmarks.recall_per_byte --out FOLDER [--worlds 48] [--seconds 60] [--seed 0]

Renders the demo model's worlds (`packforcing.evaluation.recall`) under PackForcing with more and
fewer mid blocks, selected by the model or at random, under windows with a sink, and with the whole
history. Prints a table and writes recall.json and recall.png into the folder, where finished videos
are used again. Bytes are those of the keys and values that the last block reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import msgspec

from packforcing.app.cli.output import print_tables
from packforcing.app.cli.progress import count_meter
from packforcing.app.reports.tables import make_table
from packforcing.config import Config, Policy
from packforcing.evaluation.compare import Comparison, run_comparison
from packforcing.evaluation.intervals import Estimate
from packforcing.evaluation.measures import format_value
from packforcing.evaluation.prompt_sets import draw_worlds
from packforcing.evaluation.recall import CHANCE, JUDGED
from packforcing.presets import policies
from packforcing.runtime import demo_bundle
from packforcing.runtime.allocations import token_bytes
from packforcing.runtime.bundle import read_manifest

MIDS = (1, 2, 4, 6, 12, 24)  # blocks
WINDOWS = (2, 3, 4, 6, 12, 24)  # blocks


class Point(msgspec.Struct, frozen=True):
    """A policy's recall. `difference` is from full history, world by world."""

    curve: str
    blocks: int
    context_bytes: int
    recall: Estimate | None
    difference: Estimate | None
    retrieved: Estimate | None


def curves(config: Config) -> dict[str, dict[int, Policy]]:
    """Return the policies of each curve, by the number of blocks that varies."""
    own = policies(config)["packforcing"]
    change = msgspec.structs.replace
    return {
        "full history": {0: policies(config)["full-history"]},
        "PackForcing": {mid: change(own, mid=mid) for mid in MIDS},
        "selected at random": {mid: change(own, mid=mid, selection="random") for mid in MIDS},
        "sink and window": {recent: change(own, mid=0, recent=recent) for recent in WINDOWS},
    }


def measure(folder: Path, worlds: int, seconds: float, seed: int) -> list[Point]:
    """Render what is missing and return all points."""
    bundle = demo_bundle()
    config = read_manifest(bundle).config
    by_name = {
        f"{curve}-{blocks}".replace(" ", "-"): (curve, blocks, policy)
        for curve, each in curves(config).items()
        for blocks, policy in each.items()
    }
    with count_meter("recall", "frames", quiet=False) as on_frame:
        comparison = run_comparison(
            bundle, {name: policy for name, (_, _, policy) in by_name.items()},
            draw_worlds(config, worlds, seed, seconds), seconds, folder, progress=on_frame,
        )  # fmt: skip
    return [
        _point(config, comparison, name, curve, blocks)
        for name, (curve, blocks, _) in by_name.items()
    ]


def _point(config: Config, comparison: Comparison, name: str, curve: str, blocks: int) -> Point:
    rows = comparison.whole[name]
    return Point(
        curve, blocks, comparison.costs[name].tokens_read * token_bytes(config),
        rows["recall"].value, rows["recall"].difference, rows["retrieved"].value,
    )  # fmt: skip


def draw(points: list[Point], path: Path) -> None:
    """Draw recall with its intervals against MB of context."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for curve in dict.fromkeys(point.curve for point in points):
        known = [(p.context_bytes / 1e6, p.recall) for p in points if p.curve == curve and p.recall]
        sizes = [size for size, _ in known]
        axes.plot(sizes, [recall.mean for _, recall in known], marker="o", label=curve)
        low, high = ([getattr(recall, end) for _, recall in known] for end in ("low", "high"))
        axes.fill_between(sizes, low, high, alpha=0.2)
    axes.axhline(CHANCE, color="gray", linestyle=":", label="a guess")
    axes.set(
        xscale="log", xlabel="context read by a block, MB", ylabel="recall on return", ylim=(0, 1)
    )
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", type=int, default=JUDGED, help="two or more")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    points = measure(args.out, args.worlds, args.seconds, args.seed)
    (args.out / "recall.json").write_bytes(msgspec.json.format(msgspec.json.encode(points)))
    draw(points, args.out / "recall.png")
    rows = [
        (point.curve, f"{point.blocks}", f"{point.context_bytes / 1e6:.2f}", _format(point.recall),
         _format(point.difference), _format(point.retrieved)) for point in points
    ]  # fmt: skip
    print_tables(
        make_table(rows, ("", "blocks", "MB", "recall", "from full history", "retrieved"), "lr")
    )


def _format(estimate: Estimate | None) -> str:
    if estimate is None or estimate.low is None:
        return format_value(estimate and estimate.mean)
    return f"{estimate.mean:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


if __name__ == "__main__":
    main()
