"""Policies that change one setting of PackForcing, to measure what each setting is worth."""

from __future__ import annotations

from typing import Any

import msgspec

from packforcing.config import Config, Policy
from packforcing.presets import policies


def comparison_policies(config: Config) -> dict[str, Policy]:
    """Return all policies that `packforcing compare` knows, by name.

    Those that a model can be rendered under (`packforcing.presets.policies`), then ablations of
    "packforcing": the selection of mid blocks, the number of sink blocks, the positions that a mid
    block spans (a half or a quarter of its own latent frames), the commit by the last step and,
    where the model has a compressor, the branch that is used alone.

    Args:
        config: The model.
    """
    shipped = policies(config)
    changes: dict[str, dict[str, Any]] = {
        "first-step": {"selection": "first-step"},
        "likeness": {"selection": "likeness"},
        "recency": {"selection": "recency"},
        "random": {"selection": "random"},
        **{f"sink-{blocks}": {"sink": blocks} for blocks in range(3)},
        "half-span": {"mid_span": config.block_frames / 2},
        "quarter-span": {"mid_span": config.block_frames / 4},
        "last-step": {"commit": "last-step"},
    }
    if config.compressor_widths:
        changes |= {f"{branch}-branch": {"branches": branch} for branch in ("high", "low")}
    return shipped | {
        f"packforcing-{name}": msgspec.structs.replace(shipped["packforcing"], **change)
        for name, change in changes.items()
    }
