"""Compare rules for what a full archive gives up, by the videos that are made under them.

    python -m benchmarks.compare_eviction [--prompts 8] [--seconds 120] [--limit 24] [--seed 0]

Each prompt is rendered with an archive of all blocks and then, per rule, with one of `--limit`
blocks. The table has the last quarter of the videos: means over the prompts, below them the
difference from the whole archive with its interval, and what the mid blocks are: how old on
average, in blocks. All rules keep the first block and what selection reads now.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np

from packforcing import selection
from packforcing.evaluation import demo_judge
from packforcing.evaluation.intervals import estimate_mean
from packforcing.evaluation.measures import ALL_MEASURES, measure_frames
from packforcing.evaluation.prompt_sets import Prompt, draw_prompts
from packforcing.runtime import Session, archive, demo_bundle
from packforcing.runtime.blocks import Block

SKIPPED = {"motion", "dynamic_degree", "smoothness", "speed"}  # they say nothing about a memory
MEASURES = [name for name in ALL_MEASURES if name not in SKIPPED]
Evict = Callable[[Sequence[int], Collection[int]], int]


def oldest(blocks: Sequence[int], needed: Collection[int]) -> int:
    """Give up the oldest block after the first: the archive is a window."""
    return next(block for block in blocks[1:] if block not in needed)


def random(blocks: Sequence[int], needed: Collection[int]) -> int:
    """Give up any block after the first."""
    rng = np.random.default_rng([blocks[-1], len(blocks)])
    return int(rng.choice([block for block in blocks[1:] if block not in needed]))


class LeastRead:
    """Gives up the block that was read least often per block since it was stored."""

    def __init__(self) -> None:
        self.reads: dict[int, int] = {}

    def note(self, block: Block) -> None:
        """Count what a block read."""
        if block.info.index == 0:
            self.reads.clear()
        for read in block.info.read:
            self.reads[read] = self.reads.get(read, 0) + 1

    def __call__(self, blocks: Sequence[int], needed: Collection[int]) -> int:
        def rate(block: int) -> tuple[float, int]:
            return self.reads.get(block, 0) / (blocks[-1] + 1 - block), block

        return min((block for block in blocks[1:] if block not in needed), key=rate)


def measure(
    session: Session, prompt: Prompt, seconds: float, limit: int | None, note: Callable
) -> dict[str, float]:
    """Render a prompt and measure the last quarter of its video."""
    ages: list[float] = []
    frames: list[np.ndarray] = []
    video = session.begin(
        prompt.content, prompt.seed, seconds=seconds, lead=None, archive_limit=limit
    )
    for block in video:
        note(block)
        frames.extend(block.frames)
        ages.extend(block.info.index - read for read in block.info.read)
    fps, first = session.config.fps, len(frames) * 3 // 4
    tally = measure_frames(islice(frames, first, None), fps, prompt.text)
    values = {name: tally.total().get(name) for name in MEASURES}
    visits = [v for v in demo_judge.returns(prompt.text, iter(frames)) if v.frame >= first]
    values["returns"] = float(len(visits)) if is_tour(prompt) else None
    values["loop_closure"] = float(np.mean([v.error for v in visits])) if visits else None
    values["age"] = float(np.mean(ages[len(ages) * 3 // 4 :]))
    return {name: value for name, value in values.items() if value is not None}


def is_tour(prompt: Prompt) -> bool:
    return len(demo_judge.places(prompt.text)) > 1


def table(results: dict[str, list[dict[str, float]]]) -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    names = [*results]
    yield "| | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for measure_name in (*MEASURES, "age"):
        cells = []
        for name in names:
            pairs = [
                (mine[measure_name], whole[measure_name])
                for mine, whole in zip(results[name], results[names[0]])
                if measure_name in mine and measure_name in whole
            ]
            if not pairs:
                cells.append("")
                continue
            cell = f"{np.mean([mine for mine, _ in pairs]):.3f}"
            if name != names[0]:
                change = estimate_mean([mine - whole for mine, whole in pairs])
                assert change is not None
                if change.low is not None and change.high is not None:
                    cell += f" ({change.mean:+.3f}; {change.low:+.3f} to {change.high:+.3f})"
            cells.append(cell)
        yield f"| {measure_name.replace('_', ' ')} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    least_read = LeastRead()
    rules: dict[str, Evict | None] = {
        "all": None,
        "smallest gap": selection.evict,
        "oldest": oldest,
        "random": random,
        "least read": least_read,
    }
    results: dict[str, list[dict[str, float]]] = {name: [] for name in rules}
    with Session.open(demo_bundle(), threads=1) as session:
        run = partial(measure, session, seconds=args.seconds, note=least_read.note)
        for prompt in draw_prompts(session.config, args.prompts, args.seed):
            for name, rule in rules.items():
                if rule is not None:
                    archive.evict = rule  # type: ignore[assignment]
                limit = None if rule is None else args.limit
                results[name].append(run(prompt, limit=limit))
                print(f"{prompt.text}, {name}: {results[name][-1]}", flush=True)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
