"""Apply the values of options to a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packforcing.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from packforcing.config import Config, Policy, Precision
    from packforcing.sampler import StepOverrides


def with_shape(
    config: Config,
    size: tuple[int, int] | None,
    block_frames: int | None,
    history: tuple[int, int, int] | None,
    policy: str | None,
    vae: str | None,
    steps: tuple[float, ...] | int | None,
    first_steps: tuple[float, ...] | int | None,
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
        _check_history(config, policy, history[1])
        partitions = dict(zip(("sink", "mid", "recent"), history))
        resized = msgspec.structs.replace(config.policy, **partitions)
        config = msgspec.structs.replace(config, policy=resized)
    return step_overrides(config, steps, first_steps, shift, commit).apply(config)


def _check_history(config: Config, policy: str | None, mid: int) -> None:
    """Refuse numbers of blocks that would turn a policy into another one.

    Raises:
        ConfigError: The policy has no mid blocks, or reads every block.
    """
    own = config.policy
    if policy == "full-history":
        raise ConfigError(f"{policy} reads every block: leave out --history, or choose a window")
    if mid and not own.mid:
        name = policy or f"that {config.name} was published with"
        raise ConfigError(
            f"the policy {name} has no mid blocks: use --policy packforcing, or 0 for MID"
        )


def step_overrides(
    config: Config,
    steps: tuple[float, ...] | int | None,
    first_steps: tuple[float, ...] | int | None,
    shift: float | None,
    commit: Literal["clean", "last-step"] | None,
) -> StepOverrides:
    """Return the values of the options for steps.

    Raises:
        ConfigError: The weights were not trained for a number of steps.
    """
    from packforcing.presets import trained_timesteps
    from packforcing.sampler import StepOverrides

    if isinstance(first_steps, int):
        raise ConfigError("--first-steps takes a list of steps, like 1000,750,500,250")
    if isinstance(steps, int):
        steps = trained_timesteps(config, steps)
    return StepOverrides(steps, first_steps, shift, commit)


def require_size(directory: Path, config: Config, size: tuple[int, int], backend: str) -> None:
    """Refuse a bundle whose frames have another size.

    Args:
        directory: The bundle.
        config: Its config.
        size: Width and height that frames are to have.
        backend: That it is to run on.

    Raises:
        ConfigError: They differ. Names a bundle beside it that has this size, or the commands that
            make one; where no bundle can have it, the sizes nearest to it.
    """
    import msgspec

    from packforcing.app.reports.realtime import commands
    from packforcing.runtime.backends import ENGINE_BACKENDS
    from packforcing.runtime.bundle import MANIFEST, read_manifest
    from packforcing.runtime.engine_records import read_record

    width, height = size
    if size == (config.width, config.height):
        return
    sized = msgspec.structs.replace(config, width=width, height=height)
    differs = f"{directory} makes frames of {config.width}x{config.height}, not {width}x{height}"
    for path in sorted(directory.resolve().parent.glob(f"*/{MANIFEST}")):
        with suppress(BundleError):
            other = read_manifest(path.parent).config
            if msgspec.structs.replace(other, precision=config.precision) == sized:
                raise ConfigError(f"{differs}: use --bundle {path.parent}")
    record = read_record(directory, backend, "denoiser")
    targets = record.key.targets if record else ("sm86", "sm89", "sm120")
    steps = [
        step
        for step in commands(sized, ",".join(targets))
        if backend in ENGINE_BACKENDS or not step.startswith("packforcing build ")
    ]
    raise ConfigError(
        f"{differs}. To make a bundle of that size in the folder 'fast': {' && '.join(steps)}"
    )


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
