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
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from packforcing import model_config
from packforcing.evaluation.recall import draw_world


class Case(NamedTuple):
    """The first block of a return. Scores are [candidates, L H], one for each layer and head."""

    shows: np.ndarray  # bool [candidates], whether a candidate shows the place
    first: np.ndarray  # by the queries of the block's first step
    commit: np.ndarray  # by those of the commit before
    centered: np.ndarray  # by those of the first step, less their mean over the blocks before


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
                ))  # fmt: skip
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pools", help="pattern of the files of evaluate.py --pools")
    args = parser.parse_args()
    cases, mid = read_cases(args.pools), model_config("demo").policy.mid
    rng = np.random.default_rng(0)

    def spread(scores: np.ndarray) -> np.ndarray:
        return (scores - scores.mean(0)) / np.maximum(scores.std(0), 1e-9)

    rules: dict[str, Callable[[Case], np.ndarray]] = {
        "affinity, first step": lambda case: case.first.sum(1),
        "affinity, commit before": lambda case: case.commit.sum(1),
        "less the mean query": lambda case: case.centered.sum(1),
        "each head in standard deviations": lambda case: spread(case.first).sum(1),
        "newest": lambda case: np.arange(len(case.shows)),
        "random": lambda case: rng.random(len(case.shows)),
    }
    print(f"{len(cases)} returns, {mid} blocks read of each")
    for name, rule in rules.items():
        hits = [case.shows[np.argsort(rule(case), kind="stable")[-mid:]].any() for case in cases]
        print(f"{name}: {np.mean(hits):.2f}")


if __name__ == "__main__":
    main()
