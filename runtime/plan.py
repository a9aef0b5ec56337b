"""The memory of a rollout, known before anything is exported, built or loaded.

A plan lists every allocation on the card, in bytes, for one config and one target: weights of
the engines that run there, one scratch that they share because they take turns, and the fixed
buffers. All of it follows from the config; what a builder measured takes the place of an
estimate where it is given. The CUDA context is the driver's, not ours to plan, and stays
outside every budget.

`choose_plan` finds the plan for a budget: the first that fits of `plans`, so more memory never gives
a worse plan. What is given up, in this order:

0. Wan's autoencoder for the tiny one, where both are allowed: its state alone is larger than what
   any of the next steps saves, and it does 25 times the work.
1. a little time, results being the same: at most a tenth of the denoiser's weights stays in host
   memory and is streamed in. (The decoder works in strips already, where the config says so.)
2. precision: an 8-bit cache, then 8-bit weights, then 4-bit weights, at each of them 1 before the
   next. The cache goes first because it is the largest part.
3. context: mid blocks one by one, then a sink block, all mids back. Never the recent blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

import msgspec

from packforcing.config import Config, Precision
from packforcing.errors import ConfigError, PlanError
from packforcing.presets import with_autoencoder
from packforcing.runtime.allocations import (
    archive_bytes,
    device_bytes,
    host_bytes,
    snapshot_bytes,
)
from packforcing.runtime.bundle import GPU_GRAPHS
from packforcing.runtime.estimate import (
    matrix_bytes,
    scratch_bytes,
    weight_bytes,
)
from packforcing.units import format_gib

LONGEST = 24 * 3600.0  # seconds of video; beyond a day a typing error is likelier than a wish
# Kept free of everything below: kernels compiled on the card may want more scratch than the
# builder foresaw, and allocators round up.
RESERVE = 128 << 20
# What the driver takes for itself, beside the budget. A prediction.
CUDA_CONTEXT = 400 << 20
STREAMED = 0.1  # the largest part of the denoiser's weights that a plan streams
IN_WORDS = {  # autoencoders
    "taehv": "the tiny autoencoder",
    "lighttae": "the tiny autoencoder",
    "wan": "Wan's autoencoder",
}
# Number formats beyond fp32 and fp16 that engines for a target may hold (TensorRT-RTX 1.7)
TARGETS: dict[str, tuple[str, ...]] = {
    "sm75": (),
    "sm80": ("int8", "int4"),
    "sm86": ("int8", "int4"),
    "sm89": ("int8", "int4", "fp8"),
    "sm120": ("int8", "int4", "fp8"),
    "sm121": ("int8", "int4", "fp8"),
}


@dataclass(frozen=True)
class Plan:
    """Bytes by purpose for `config`, with the policy and precision that it is to run with."""

    config: Config
    target: str
    device: dict[str, int]  # allocated on the card once, never grows
    host: dict[str, int]  # beside Python and its libraries
    host_loading: int  # at most, while engines are loaded, before copies and archive exist
    streamed: int = 0  # of the denoiser's weights: on the host, not on the card

    @property
    def total(self) -> int:
        """Bytes on the card, the reserve included and the CUDA context not."""
        return sum(self.device.values())


def estimates(config: Config) -> dict[str, int]:
    """Bytes that engines take: weights.<engine>, and scratch.<call> for each shape of a call."""
    weights = weight_bytes(config)
    return {
        **{f"weights.{name}": weights[name] for name in GPU_GRAPHS},
        **{f"scratch.{call}": size for call, size in scratch_bytes(config).items()},
    }


def make_plan(
    config: Config, target: str, *, seconds: float = 60, built: Mapping[str, int] | None = None
) -> Plan:
    """Every allocation for a config as it is.

    seconds: of video, for the archive. built: what a builder measured, under the names of
    `estimates`. Raises `ConfigError` for a target that is unknown or lacks a number format.
    """
    if not 0 < seconds <= LONGEST:
        raise ConfigError(f"seconds must be above 0 and at most {LONGEST:.0f}; it is {seconds:g}")
    check_target(config.precision, target)
    engines = {**estimates(config), **(built or {})}
    weights = {f"weights.{name}": engines[f"weights.{name}"] for name in GPU_GRAPHS}
    on_host = weight_bytes(config)["prompt"] + weight_bytes(config)["vae_encoder"]
    blocks = config.blocks(config.frames(seconds))
    return Plan(
        config,
        target,
        device={
            **weights,
            "scratch": max(engines[name] for name in engines if name.startswith("scratch.")),
            **device_bytes(config),
            "reserve": RESERVE,
        },
        host={
            "graphs": on_host,
            "copies": host_bytes(config),
            "archive": archive_bytes(config, blocks),
            "checkpoint": snapshot_bytes(config),
        },
        host_loading=on_host + max(weights.values()),
    )


def check_target(precision: Precision, target: str) -> None:
    """Raises `ConfigError` for a target that is unknown or lacks one of the number formats."""
    if target not in TARGETS:
        raise ConfigError(f"unknown target '{target}'; known targets: {', '.join(TARGETS)}")
    has = ("fp32", "fp16", *TARGETS[target])
    for purpose in ("weights", "cache"):
        kind = getattr(precision, purpose)
        if kind not in has:
            raise ConfigError(f"{target} has no {kind} for the {purpose}; it has {', '.join(has)}")


def choose_plan(
    config: Config,
    target: str,
    budget: int | None = None,
    *,
    precision: Precision | None = None,
    seconds: float = 60,
    built: Mapping[str, int] | None = None,
    any_autoencoder: bool = False,
) -> Plan:
    """The first of `plans` that fits into `budget` bytes, streaming as little as it needs.

    Without a budget, or with engines that are built, nothing is given up. any_autoencoder: given a
    budget, Wan's comes before the config's own, but only where nothing else has to go. Raises
    `PlanError` naming the smallest budget that can be met, and `ConfigError` as `make_plan` does.
    """
    whole = msgspec.structs.replace(config, precision=precision or config.precision)
    best = make_plan(whole, target, seconds=seconds, built=built)
    if budget is None:
        return best
    if any_autoencoder and config.wan_latents:
        large = make_plan(with_autoencoder(whole, "wan"), target, seconds=seconds)
        if large.total <= budget:
            return large
    least = best
    candidates = plans(config, target, budget, precision, seconds) if built is None else [best]
    for candidate in candidates:
        least = stream(candidate, budget)
        if least.total <= budget:
            return least
    smallest = format_gib(least.total, round_up=True)
    raise PlanError(
        f"{config.name} at {config.width}x{config.height} does not fit into {format_gib(budget)} "
        f"GiB on {target}: the least it can take is {smallest} GiB, with {describe(least)}; give "
        f"--budget {smallest} or more{_tiny(least)}",
        least.total,
    )


def _tiny(plan: Plan) -> str:
    """What a plan that does not fit would take without Wan's autoencoder."""
    if plan.config.vae != "wan":
        return ""
    tiny = make_plan(with_autoencoder(plan.config, "taehv"), plan.target)
    return f", or {format_gib(tiny.total, round_up=True)} with the tiny autoencoder (--vae taehv)"


def plans(
    config: Config,
    target: str,
    budget: int,
    precision: Precision | None = None,
    seconds: float = 60,
) -> Iterator[Plan]:
    """The plans that `choose_plan` considers, best first; the module's docstring has the order.

    The config's own policy is the most that is kept; sinks that cannot fit with any number of
    mids are passed over, but for the fewest. precision: consider only this one.
    """
    levels = [precision] if precision else precisions(config, target)
    sinks, mids = _down(config.policy.sink), _down(config.policy.mid)

    def plan(sink: int, mid: int, level: Precision) -> Plan:
        policy = msgspec.structs.replace(config.policy, sink=sink, mid=mid)
        smaller = msgspec.structs.replace(config, policy=policy, precision=level)
        return make_plan(smaller, target, seconds=seconds)

    for sink in sinks:
        if sink > sinks[-1] and stream(plan(sink, mids[-1], levels[-1]), budget).total > budget:
            continue
        for mid, level in product(mids, levels):
            yield plan(sink, mid, level)


def smallest(config: Config, target: str) -> tuple[Plan, Plan]:
    """The whole context in the fewest bytes with nothing streamed: with the decoder whole, and as
    the config has it."""
    level = precisions(config, target)[-1]
    least = msgspec.structs.replace(config, precision=level)
    whole = msgspec.structs.replace(least, vae_strips=1)
    return make_plan(whole, target), make_plan(least, target)


def _down(count: int) -> range:
    """From `count` to the last block of a partition; 0 alone where there is none."""
    return range(count, min(count, 1) - 1, -1)


def precisions(config: Config, target: str) -> list[Precision]:
    """The number formats to go through on a target, from the config's own.

    fp8 is not among them: it takes what int8 takes, which every target but sm75 has.
    """
    full = config.precision.compute
    steps = [(full, full), (full, "int8"), ("int8", "int8"), ("int4", "int8")]
    return [
        Precision(compute=full, weights=weights, cache=cache)  # type: ignore[arg-type]
        for weights, cache in steps
        if {weights, cache} <= {full, *TARGETS[target]}
    ]


def stream(plan: Plan, budget: int) -> Plan:
    """The plan with as many of the denoiser's weights on the host as `budget` asks for.

    At most `STREAMED` of them. They pass through two buffers on the card, each as large as the
    largest matrix; the host then holds all of the denoiser's weights.
    """
    weights = plan.device["weights.denoiser"]
    passing = 2 * max(matrix_bytes(plan.config))
    streamed = min(plan.total - budget + passing, int(STREAMED * weights))
    if streamed <= passing:
        return plan
    return replace(
        plan,
        streamed=streamed,
        device={**plan.device, "weights.denoiser": weights - streamed + passing},
        host={**plan.host, "streamed_weights": weights},
    )


def describe(plan: Plan) -> str:
    """What a plan keeps and gives up, in words."""
    policy, precision = plan.config.policy, plan.config.precision
    parts = [
        f"{policy.sink} sink, {policy.mid} mid and {policy.recent} recent blocks",
        f"{precision.weights} weights",
        f"{precision.cache} cache",
        IN_WORDS[plan.config.vae],
    ]
    if plan.streamed:
        parts.append(f"{format_gib(plan.streamed)} GiB of weights streamed")
    return ", ".join(parts)
