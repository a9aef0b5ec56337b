"""Apply the values of options to a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from packforcing.errors import ConfigError

if TYPE_CHECKING:
    from packforcing.config import Config, Policy, Precision


def with_shape(
    config: Config,
    size: tuple[int, int] | None,
    block_frames: int | None,
    history: tuple[int, int, int] | None,
    policy: str | None,
    vae: str | None,
    steps: tuple[float, ...] | None,
    first_steps: tuple[float, ...] | None,
    shift: float | None,
    commit: Literal["clean", "last-step"] | None,
    dtype: str | None = None,
) -> Config:
    """Return the config with the values of the shape options, and with one dtype throughout.

    Raises:
        ConfigError: The values do not go together.
    """
    import msgspec

    from packforcing.config import Precision
    from packforcing.presets import policies, with_autoencoder
    from packforcing.sampler import StepOverrides

    changes: dict[str, Any] = {}
    if size is not None:
        changes["width"], changes["height"] = size
    if block_frames is not None:
        changes["block_frames"] = block_frames
    if dtype is not None:
        everywhere = dict.fromkeys(("compute", "weights", "cache"), dtype)
        changes["precision"] = msgspec.convert(everywhere, Precision)
    config = msgspec.structs.replace(config, **changes)
    if vae is not None:
        config = with_autoencoder(config, vae)
    if policy is not None:
        config = msgspec.structs.replace(config, policy=policy_by_name(policy, policies(config)))
    if history is not None:
        partitions = dict(zip(("sink", "mid", "recent"), history))
        resized = msgspec.structs.replace(config.policy, **partitions)
        config = msgspec.structs.replace(config, policy=resized)
    return StepOverrides(steps, first_steps, shift, commit).apply(config)


def policy_by_name(name: str, by_name: Mapping[str, Policy]) -> Policy:
    """Look up a policy.

    Raises:
        ConfigError: No policy has this name; the message lists all.
    """
    if name not in by_name:
        raise ConfigError(f"unknown policy '{name}'; known policies: {', '.join(by_name)}")
    return by_name[name]


def with_dtypes(
    config: Config,
    weight_dtype: str | None,
    cache_dtype: str | None,
    attention_dtype: str | None = None,
) -> Precision | None:
    """Return the config's precision with other dtypes; None where none is set.

    Raises:
        ConfigError: The model computes in a dtype that excludes these.
    """
    import msgspec

    from packforcing.config import Precision

    if weight_dtype is None and cache_dtype is None and attention_dtype is None:
        return None
    precision = config.precision
    names = {
        "compute": precision.compute,
        "weights": weight_dtype or precision.weights,
        "cache": cache_dtype or precision.cache,
        "attention": attention_dtype or precision.attention,
    }
    try:
        return msgspec.convert(names, Precision)
    except msgspec.ValidationError as error:
        raise ConfigError(f"these dtypes do not go together: {error}") from error


def is_training_free(config: Config, policy: Policy) -> bool:
    """Tell whether blocks are compressed without weights trained for it."""
    return policy.mid > 0 and not config.compressor_widths
