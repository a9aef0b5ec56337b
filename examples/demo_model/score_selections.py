"""Score rules of selection by how often they find the place that a video comes back to.

    python evaluate.py --weights WEIGHTS --recall --seed 1000 --prompts 12 --seconds 60 \\
      --policy packforcing-first-step --pools out/pools
    python score_selections.py 'out/pools*.npz'

Nothing is rendered again: the mean queries and keys of the rollouts tell what each rule would have
read in the first block of every return.
"""

from __future__ import annotations

import argparse
import glob
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from packforcing import model_config
from packforcing.evaluation.recall import draw_world
from packforcing.selection import likeness

HEADS = model_config("demo").heads


class Case(NamedTuple):
    """The first block of a return. Scores are [candidates, L H], one for each layer and head."""

    shows: np.ndarray  # bool [candidates], whether a candidate shows the place
    first: np.ndarray  # by the queries of the block's first step
    commit: np.ndarray  # by those of the commit before
    centered: np.ndarray  # by those of the first step, less their mean over the blocks before
    keys: np.ndarray  # [candidates, L, H, d]
    newest: np.ndarray  # [L, H, d], the mean key of the block before


def read_cases(pattern: str) -> list[Case]:
    """Return the cases of all files of pools."""
    policy, cases = model_config("demo").policy, []
    for path in sorted(glob.glob(pattern)):
        pools = np.load(path)
        for number, first, commit, keys in zip(
            pools["numbers"], pools["first"], pools["commit"], pools["keys"]
        ):
            world = draw_world(int(number), len(keys))
            for visit in world:
                if visit.first is None:
                    continue
                candidates = np.arange(policy.sink, visit.block - policy.recent)
                before = world[visit.first]

                def score(query: np.ndarray, keys: np.ndarray = keys[candidates]) -> np.ndarray:
                    return np.einsum("lhd,clhd->clh", query, keys).reshape(len(keys), -1)

                cases.append(Case(
                    np.isin(candidates, np.arange(before.block, before.block + before.blocks)),
                    score(first[visit.block]),
                    score(commit[visit.block - 1]),
                    score(first[visit.block] - first[: visit.block].mean(0)),
                    keys[candidates],
                    keys[visit.block - 1],
                ))  # fmt: skip
    return cases


def spread(scores: np.ndarray) -> np.ndarray:
    """In standard deviations over the candidates."""
    return (scores - scores.mean(0)) / np.maximum(scores.std(0), 1e-9)


def by_rank(scores: np.ndarray, mid: int) -> np.ndarray:
    """The candidates with the highest scores, the newer one of equals."""
    return np.argsort(scores, kind="stable")[-mid:]


def diverse(case: Case, mid: int) -> np.ndarray:
    """One after the other, by the first step's affinity less the likeness to what was chosen."""
    scores = spread(case.first.sum(1))
    rows = case.keys.reshape(len(case.keys), -1)
    rows = rows - rows.mean(0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    chosen: list[int] = []
    for _ in range(min(mid, len(rows))):
        alike = (rows @ rows[chosen].T).max(1) if chosen else np.zeros(len(rows))
        value = scores - alike
        value[chosen] = -np.inf
        chosen.append(int(value.argmax()))
    return np.array(chosen)


def half_newest(case: Case, mid: int) -> np.ndarray:
    """Half of them by the first step's affinity, the rest the newest ones."""
    count = len(case.shows)
    newest = np.arange(max(0, count - mid // 2), count)
    scores = case.first.sum(1)
    scores[newest] = -np.inf
    return np.concatenate((newest, by_rank(scores, mid - len(newest))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pools", help="pattern of the files of evaluate.py --pools")
    args = parser.parse_args()
    cases, mid = read_cases(args.pools), model_config("demo").policy.mid
    rng = np.random.default_rng(0)
    heads = cases[0].first.shape[1]
    rules: dict[str, Callable[[Case], np.ndarray]] = {
        "affinity, first step": lambda case: by_rank(case.first.sum(1), mid),
        "affinity, commit before": lambda case: by_rank(case.commit.sum(1), mid),
        "less the mean query": lambda case: by_rank(case.centered.sum(1), mid),
        "each head in standard deviations": lambda case: by_rank(spread(case.first).sum(1), mid),
        "likeness to the newest block": lambda case: by_rank(likeness(case.newest, case.keys), mid),
        "affinity less likeness to those chosen": lambda case: diverse(case, mid),
        "half affinity, half newest": lambda case: half_newest(case, mid),
        "newest": lambda case: np.arange(len(case.shows))[-mid:],
        "random": lambda case: by_rank(rng.random(len(case.shows)), mid),
        **{f"head {head % HEADS} of layer {head // HEADS}, first step":
           (lambda case, head=head: by_rank(case.first[:, head], mid)) for head in range(heads)},
    }  # fmt: skip
    print(f"{len(cases)} returns, {mid} blocks read of each: share with one that shows the "
          "place; blocks that show it; time of the ranking, scores given")  # fmt: skip
    for name, rule in rules.items():
        began = time.perf_counter()
        chosen = [rule(case) for case in cases]
        each = (time.perf_counter() - began) / len(cases)
        shown = np.array([case.shows[blocks].sum() for case, blocks in zip(cases, chosen)])
        print(f"{name}: {np.mean(shown > 0):.2f}, {shown.mean():.1f} blocks, {each * 1e6:.0f} us")


if __name__ == "__main__":
    main()
