"""Turn the text of options into configs, precisions and budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from packforcing.errors import (
    ConfigError,
)

if TYPE_CHECKING:
    from packforcing.config import Config, Policy, Precision

MOST_BLOCKS = 1000  # of a kind in a history


def shaped(
    config: Config,
    size: str | None,
    block_frames: int | None,
    history: str | None,
    policy: str | None,
    vae: str | None,
    precision: str | None = None,
) -> Config:
    """A config with another frame size, block, history, autoencoder or number format."""
    import msgspec

    from packforcing.config import Precision
    from packforcing.presets import policies, with_autoencoder

    changes: dict[str, Any] = {}
    if size is not None:
        changes["width"], changes["height"] = _integers(size, "x", "--size", "WxH, like 832x480", 2)
    if block_frames is not None:
        changes["block_frames"] = block_frames
    if precision is not None:
        everywhere = dict.fromkeys(("compute", "weights", "cache"), precision)
        changes["precision"] = msgspec.convert(everywhere, Precision)
    config = msgspec.structs.replace(config, **changes)
    if vae is not None:
        config = with_autoencoder(config, vae)
    if policy is not None:
        config = msgspec.structs.replace(config, policy=policy_by_name(policy, policies(config)))
    if history is not None:
        example = "SINK,MID,RECENT, like 2,16,1"
        sink, mid, recent = _integers(history, ",", "--history", example, 3)
        if max(sink, mid, recent) > MOST_BLOCKS:  # choosing a plan goes through them
            raise ConfigError(
                f"--history takes at most {MOST_BLOCKS} blocks of each; it is '{history}'"
            )
        changed = msgspec.structs.replace(config.policy, sink=sink, mid=mid, recent=recent)
        config = msgspec.structs.replace(config, policy=changed)
    return config


def policy_by_name(name: str, known: Mapping[str, Policy]) -> Policy:
    if name not in known:
        raise ConfigError(f"unknown policy '{name}'; known policies: {', '.join(known)}")
    return known[name]


def stored_precision(text: str | None, config: Config) -> Precision | None:
    """Formats of weights and cache as WEIGHTS,CACHE; None for none named."""
    import msgspec

    from packforcing.config import Precision

    if text is None:
        return None
    weights, *cache = text.split(",")
    named = {
        "compute": config.precision.compute,
        "weights": weights,
        "cache": ",".join(cache) or weights,
    }
    try:
        return msgspec.convert(named, Precision)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"--precision takes WEIGHTS,CACHE, like fp16,int8; '{text}' does not work: {error}"
        ) from error


def budget_bytes(text: str) -> list[int]:
    """Bytes of a list of budgets in GiB, which may say so."""
    budgets = []
    for part in text.split(","):
        try:
            size = float(part.strip().lower().removesuffix("gib"))
        except ValueError:
            size = math.nan
        if not 0 < size < 10_000:
            raise ConfigError(f"--budget takes GiB, like 8 or 4,6.5,12; it is '{text}'")
        budgets.append(int(size * 2**30))
    return budgets


def _integers(text: str, separator: str, option: str, form: str, count: int) -> list[int]:
    parts = text.split(separator)
    if len(parts) != count or not all(part.isascii() and part.isdigit() for part in parts):
        raise ConfigError(f"{option} takes {form}; it is '{text}'")
    return [int(part) for part in parts]


def training_free(config: Config, policy: Policy) -> bool:
    """Whether blocks are compressed without weights made for it."""
    return policy.mid > 0 and not config.compressor_widths
