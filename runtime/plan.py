"""Plan the memory of a rollout before anything is exported, built or loaded.

A plan lists every allocation on the GPU, in bytes, for one config and one target: weights of the
engines, one scratch memory that they share because they take turns, and the fixed buffers. All of
it follows from the config. What a builder measured replaces the estimates. The CUDA context
belongs to the driver and is outside every budget.

Jetson and DGX Spark (`UNIFIED_TARGETS`) have one memory for GPU and host. There a budget is of
both: all that is on the GPU, the weights of graphs that run on the host, arrays of the host, the
archive and a checkpoint. What both sides use is one array and counts once, and streaming weights
saves nothing. A build on the device takes its memory before a rollout does: `build_bytes`.

`choose_plan` returns the first of `plans` that fits into a budget, so more memory never gives a
worse plan. This is given up, in this order:

0. Wan's autoencoder for the tiny one, where both are allowed: its state alone is larger than what
   any of the next steps saves, and it does 25 times the work.
1. A little time, with the same results: at most a tenth of the denoiser's weights stay in host
   memory and are streamed in. (The decoder runs in strips already, where the config says so.)
2. Precision: an 8-bit cache, then 8-bit weights, then 4-bit weights, each first without and then
   with streaming. The cache comes first because it is the largest part.
3. Context: mid blocks one by one, then a sink block with all mids back. Never the recent blocks.
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
from packforcing.runtime.bundle import GPU_CALLS, GPU_GRAPHS
from packforcing.runtime.estimate import (
    matrix_bytes,
    scratch_bytes,
    weight_bytes,
)
from packforcing.runtime.nvml import UNIFIED_TARGETS
from packforcing.units import format_gib

LONGEST = 24 * 3600.0  # seconds of video; beyond a day a typing error is likelier than a wish
# Stays free: kernels compiled on the GPU may need more scratch than the builder planned, and
# allocators round up.
RESERVE = 128 << 20
# Predicted: what the driver takes for itself, beside the budget.
CUDA_CONTEXT = 400 << 20
# Predicted: what firmware, a Linux without a desktop, and Python with its libraries take of memory
# that the GPU shares; beside the budget, as the context.
SYSTEM = 3 << 29
# What a builder needs of the host's memory: a factor of the bytes of graph and weights, and bytes
# besides. Measured by the full-size test of tests/export/test_engines.py with TensorRT-RTX, 2.54 GB
# of weights: 6.81 GB resident (graph and copy once each, the rest is the builder's own).
BUILDER_MEMORY = (2.6, 512 << 20)
STREAMED = 0.1  # the largest part of the denoiser's weights that a plan streams
IN_WORDS = {  # autoencoders
    "taehv": "the tiny autoencoder",
    "lighttae": "the tiny autoencoder",
    "wan": "Wan's autoencoder",
}
# dtypes beyond fp32 and fp16 that engines for a target may have: of Jetson's by TensorRT 10.16, of
# the others by TensorRT-RTX 1.7
TARGETS: dict[str, tuple[str, ...]] = {
    "sm75": (),
    "sm80": ("int8", "int4", "w8a8"),
    "sm86": ("int8", "int4", "w8a8"),
    "sm87": ("int8", "int4", "w8a8"),
    "sm89": ("int8", "int4", "w8a8", "fp8"),
    "sm110": ("int8", "int4", "w8a8", "fp8", "nvfp4"),
    "sm120": ("int8", "int4", "w8a8", "fp8", "nvfp4"),
    "sm121": ("int8", "int4", "w8a8", "fp8", "nvfp4"),
}
# Orin and Thor: TensorRT builds for them on the device, TensorRT-RTX does not know them
JETSON_TARGETS = ("sm87", "sm110")


@dataclass(frozen=True)
class Plan:
    """The memory of one config.

    Attributes:
        config: The config, with the policy and precision that it runs with.
        target: The GPU architecture, like "sm89".
        device: Bytes on the GPU by purpose, allocated once.
        host: Bytes of host memory by purpose, beside Python and its libraries. Where the GPU
            shares it, without what is in `device`.
        host_loading: Largest host memory while engines are loaded, before `host` is allocated.
        streamed: Bytes of the denoiser's weights that are on the host and not on the GPU.
    """

    config: Config
    target: str
    device: dict[str, int]
    host: dict[str, int]
    host_loading: int
    streamed: int = 0

    @property
    def shared(self) -> bool:
        """Whether the GPU and the host have one memory."""
        return self.target in UNIFIED_TARGETS

    @property
    def total(self) -> int:
        """Bytes that a budget has to hold, with the reserve and without the CUDA context.

        Those on the GPU, or of GPU and host where they have one memory.
        """
        return sum(self.device.values()) + (sum(self.host.values()) if self.shared else 0)

    @property
    def at_start(self) -> int:
        """Bytes of `total` that are allocated before a video begins."""
        later = ("archive", "checkpoint") if self.shared else ()
        return self.total - sum(self.host[name] for name in later)


def estimates(config: Config) -> dict[str, int]:
    """Estimate the bytes of engines: weights.<engine>, and scratch.<call> for each call."""
    weights = weight_bytes(config)
    return {
        **{f"weights.{name}": weights[name] for name in GPU_GRAPHS},
        **{f"scratch.{call}": size for call, size in scratch_bytes(config).items()},
    }


def device_rows(config: Config, built: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the bytes on the GPU by purpose; `built` is as in `make_plan`."""
    engines = {**estimates(config), **(built or {})}
    return {
        **{f"weights.{name}": engines[f"weights.{name}"] for name in GPU_GRAPHS},
        "scratch": max(engines[name] for name in engines if name.startswith("scratch.")),
        **device_bytes(config),
        "reserve": RESERVE,
    }


def make_plan(
    config: Config, target: str, *, seconds: float = 60, built: Mapping[str, int] | None = None
) -> Plan:
    """Plan a config as it is.

    Args:
        config: The model, its policy and precision.
        target: The GPU architecture, like "sm89".
        seconds: Length of the video, for the archive.
        built: What a builder measured, under the names of `estimates`.

    Raises:
        ConfigError: The target is unknown or lacks a dtype, or `seconds` is out of range.
    """
    if not 0 < seconds <= LONGEST:
        raise ConfigError(f"seconds must be above 0 and at most {LONGEST:.0f}; it is {seconds:g}")
    check_target(config.precision, target)
    device = device_rows(config, built)
    on_host = weight_bytes(config)["prompt"] + weight_bytes(config)["vae_encoder"]
    blocks, shared = config.blocks(config.frames(seconds)), target in UNIFIED_TARGETS
    return Plan(
        config,
        target,
        device=device,
        host={
            "graphs": on_host,
            "copies": host_bytes(config, shared=shared),
            "archive": archive_bytes(config, blocks),
            "checkpoint": snapshot_bytes(config),
        },
        host_loading=on_host + max(device[f"weights.{name}"] for name in GPU_GRAPHS),
    )


def further_video(plan: Plan) -> int:
    """Return the bytes of `total` that another video at once takes: it shares all but buffers."""
    own = ("copies", "archive", "checkpoint") if plan.shared else ()
    return sum(device_bytes(plan.config).values()) + sum(plan.host[name] for name in own)


def memory_budget(memory: int, target: str) -> int:
    """Return the bytes of a GPU's memory that a plan may take: all but what others are known to.

    Args:
        memory: The GPU's, in bytes, or the module's where it shares it.
        target: The GPU architecture.
    """
    return memory - CUDA_CONTEXT - (SYSTEM if target in UNIFIED_TARGETS else 0)


def build_bytes(config: Config, graph: str, graph_bytes: int | None = None) -> int:
    """Predict the memory in which an engine is built on a device that shares it with the host.

    The builder's own, as measured with TensorRT-RTX, which uses no GPU; and what TensorRT has on
    the GPU to try kernels: weights, the scratch of its calls, and the CUDA context.

    Args:
        config: The model.
        graph: Its name in the contract.
        graph_bytes: Size of the graph with its weights. None: estimated.
    """
    weights, (factor, base) = weight_bytes(config)[graph], BUILDER_MEMORY
    scratch = max(size for call, size in scratch_bytes(config).items() if GPU_CALLS[call] == graph)
    host = int(factor * (weights if graph_bytes is None else graph_bytes)) + base
    return host + weights + scratch + CUDA_CONTEXT


def videos_at_once(plan: Plan, budget: int) -> int:
    """Return how many videos one session can make at once within a budget, in bytes."""
    return max(0, 1 + (budget - plan.total) // further_video(plan))


def check_target(precision: Precision, target: str) -> None:
    """Check that engines for a target can have a precision.

    Raises:
        ConfigError: The target is unknown or lacks a dtype.
    """
    if target not in TARGETS:
        raise ConfigError(f"unknown target '{target}'; known targets: {', '.join(TARGETS)}")
    has = ("fp32", "fp16", *TARGETS[target])
    for purpose in ("weights", "cache", "attention"):
        kind = getattr(precision, purpose)
        if kind is not None and kind not in has:
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
    """Return the first of `plans` that fits into a budget, with as little streaming as it needs.

    Args:
        config: The model; its policy is the most context that is planned.
        target: The GPU architecture, like "sm89".
        budget: Bytes. None: give nothing up.
        precision: Consider only this one; None: all of the target.
        seconds: Length of the video, for the archive.
        built: What a builder measured. Only streaming is then left to give up.
        any_autoencoder: Prefer Wan's autoencoder, where nothing else has to be given up for it.

    Raises:
        PlanError: Nothing fits; the message has the smallest budget that does.
        ConfigError: As `make_plan`.
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
    """Name the budget that would do without Wan's autoencoder."""
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
    """Yield the plans that `choose_plan` considers, best first, in the order given at the top.

    Numbers of sinks that fit with no number of mids are skipped, except the smallest.

    Args:
        config: The model; its policy is the most context that is planned.
        target: The GPU architecture.
        budget: Bytes.
        precision: Consider only this one; None: all of the target.
        seconds: Length of the video, for the archive.
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
    """Return the smallest plans of the whole context with nothing streamed.

    Returns:
        With the decoder on whole frames, and with the decoder as the config has it.
    """
    level = precisions(config, target)[-1]
    least = msgspec.structs.replace(config, precision=level)
    whole = msgspec.structs.replace(least, vae_strips=1)
    return make_plan(whole, target), make_plan(least, target)


def _down(count: int) -> range:
    """Return `count` down to 1, or 0 alone."""
    return range(count, min(count, 1) - 1, -1)


def precisions(config: Config, target: str) -> list[Precision]:
    """Return the precisions to consider on a target, best first, from the config's own.

    fp8 is not among them: it needs as much as int8, which every target but sm75 has. Neither are
    int8 weights on a Jetson: of integers that are only stored, TensorRT's documentation knows int4
    alone, and its builder may write int8 out in fp16.
    """
    full = config.precision.compute
    steps = [(full, full), (full, "int8"), ("int8", "int8"), ("int4", "int8")]
    if target in JETSON_TARGETS:
        steps.remove(("int8", "int8"))
    return [
        Precision(compute=full, weights=weights, cache=cache)  # type: ignore[arg-type]
        for weights, cache in steps
        if {weights, cache} <= {full, *TARGETS[target]}
    ]


def stream(plan: Plan, budget: int) -> Plan:
    """Return a plan with as many of the denoiser's weights on the host as a budget needs.

    At most the share `STREAMED` of them, and none where both have one memory. They pass through two
    buffers on the GPU, each as large as the largest matrix; the host then has all of the denoiser's
    weights.
    """
    if plan.shared:
        return plan
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
    """Describe the context, precision and autoencoder of a plan in a line."""
    policy, precision = plan.config.policy, plan.config.precision
    parts = [
        f"{policy.sink} sink, {policy.mid} mid and {policy.recent} recent blocks",
        f"{precision}",
        IN_WORDS[plan.config.vae],
    ]
    if plan.streamed:
        parts.append(f"{format_gib(plan.streamed)} GiB of weights streamed")
    return ", ".join(parts)
