"""Rollouts under policies that exist to measure what a part of PackForcing is worth.

Each overrides one step of `packforcing.runtime.rollout.Rollout`; a session takes `make_rollout`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from packforcing.config import Config
from packforcing.runtime.backends import Backend
from packforcing.runtime.rollout import Rollout
from packforcing.selection import likeness


class LikenessRollout(Rollout):
    """Selects mid blocks by their keys' likeness to the newest block's."""

    selections = ("likeness",)

    def score(self, block: int, candidates: Sequence[int]) -> np.ndarray:
        (own,) = self.archive.keys(range(block, block + 1))
        return likeness(own, self.archive.keys(candidates))


class OneBranchRollout(Rollout):
    """Compresses blocks with one of the compressor's branches alone."""

    branches = ("high", "low")

    def compress(self) -> None:
        super().compress()
        unused = {"high": "tokens", "low": "extra"}[self.config.policy.branches]
        self.device.zero(self.buffers.compressor[unused])


def make_rollout(config: Config, backend: Backend) -> Rollout:
    """Make the rollout of any policy, ablations included.

    Args:
        config: The bundle's, with the policy to follow.
        backend: Runs the graphs.
    """
    if config.policy.branches != "both":
        return OneBranchRollout(config, backend)
    return (LikenessRollout if config.policy.selection == "likeness" else Rollout)(config, backend)
