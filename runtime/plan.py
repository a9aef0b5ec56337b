"""The memory of a rollout, known before anything is exported, built or loaded.

A plan lists every allocation on the card, in bytes, for one config and one target: weights of
the engines that run there, one scratch that they share because they take turns, and the fixed
buffers. All of it follows from the config; what a builder measured takes the place of an
estimate where it is given. The CUDA context is the driver's, not ours to plan, and stays
outside every budget.

`choose` finds the plan for a budget: the first that fits of `plans`, so more memory never gives
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
from packforcing.runtime.bundle import GPU_GRAPHS
from packforcing.runtime.estimate import (
    ITEM,
    matrix_bytes,
    scratch_bytes,
    tensor_bytes,
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


def memory(config: Config) -> dict[str, int]:
    """Bytes of the buffers that a rollout allocates beside weights and scratch, by purpose.

    All but `archive_per_block` is allocated once; the archive grows by that much with every
    block beyond the sink. `inputs_outputs` includes what lies on the host always, `host_only`.
    """
    tensors = tensor_bytes(config)
    block, compressed = tensors["denoiser.block"], tensors["denoiser.compressed"]
    # the mid pass reads what the compressor wrote and the block's tables
    shared = ("tokens", "extra", "ctx_cos", "ctx_sin")
    latents = tensors["vae_decoder"]["latent"] * config.block_frames
    return {
        "context": _bytes(block, "k_ctx", "v_ctx"),
        "staging": _bytes(block, "k_new", "v_new") + _bytes(compressed, "k_new", "v_new"),
        "cross_attention": _bytes(tensors["prompt"], "cross_k", "cross_v"),
        "autoencoder_state": _bytes(tensors["vae_decoder"], "state", "new_state"),
        "inputs_outputs": host_only(config)
        + sum(size for name, size in block.items() if "." not in name)
        + sum(size for name, size in compressed.items() if "." not in name and name not in shared)
        + sum(tensors["compressor"].values())
        + (0 if "latents" in tensors["compressor"] else latents),
        "archive_per_block": archive_bytes(config, config.policy.sink + 1),
    }


def archive_bytes(config: Config, blocks: int) -> int:
    """Bytes of the archive of a video of this many blocks: keys and values as in the cache, and
    pooled keys in fp32."""
    if not config.policy.mid:
        return 0
    rows = max(0, blocks - config.policy.sink)
    pooled = config.layers * config.dim * ITEM["fp32"]
    return rows * (config.compressed_tokens * token_bytes(config) + pooled)


def token_bytes(config: Config) -> int:
    """Bytes of one token in the cache: keys and values of all layers."""
    return 2 * config.layers * config.dim * ITEM[config.precision.cache]


def host_only(config: Config) -> int:
    """Bytes of the prompt's embedding, the recent blocks' clean tokens and, where rollouts restart,
    of what the encoder reads and writes."""
    tensors = tensor_bytes(config)
    recent = config.policy.recent * tensors["denoiser.block"]["tokens"]
    encoder = sum(tensors["vae_encoder"].values()) if config.policy.restart else 0
    return tensors["prompt"]["text"] + recent + encoder


def host_copies(config: Config) -> int:
    """Bytes of page-locked host memory: what the host writes for the card or reads from it."""
    tensors = tensor_bytes(config)
    step = ("tokens", "flow", "timestep", "q_pool")
    placed = ("rope_cos", "rope_sin", "kv_len")
    return (
        _bytes(
            tensors["denoiser.block"], *step, *placed, "ctx_cos", "ctx_sin", "cross_k", "cross_v"
        )
        + _bytes(tensors["denoiser.compressed"], *placed, "k_pool", "k_new", "v_new")
        + tensors["vae_decoder"]["latent"] * config.block_frames
        + tensors["compressor"]["pixels"]
    )


def checkpoint_bytes(config: Config) -> int:
    """Bytes of host memory that a checkpoint takes at most, while it is made: keys and values of
    the sink and the recent blocks, with those of a whole context for one layer's keys or values
    beside them, once as they are and once on their way from the card, and the decoder's state."""
    buffers, policy = memory(config), config.policy
    tokens = (policy.sink + policy.recent) * config.block_tokens
    layer = buffers["context"] // (2 * config.layers)
    return tokens * token_bytes(config) + 2 * layer + buffers["autoencoder_state"] // 2


def _bytes(tensors: Mapping[str, int], *names: str) -> int:
    """Sum over the tensors of these names, those of all layers where there is one per layer."""
    return sum(size for name, size in tensors.items() if name.split(".")[0] in names)


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
    buffers, policy, token = memory(config), config.policy, token_bytes(config)
    on_host_only = host_only(config)
    on_host = weight_bytes(config)["prompt"] + weight_bytes(config)["vae_encoder"]
    blocks = config.blocks(config.frames(seconds))
    return Plan(
        config,
        target,
        device={
            **weights,
            "scratch": max(engines[name] for name in engines if name.startswith("scratch.")),
            "cache.sink": token * policy.sink * config.block_tokens,
            "cache.recent": token * policy.recent * config.block_tokens,
            "cache.mid": token * policy.mid * config.compressed_tokens,
            "staging.block": token * config.block_tokens,
            "staging.compressed": token * config.compressed_tokens,
            "cross_attention": buffers["cross_attention"],
            "autoencoder_state": buffers["autoencoder_state"],
            "inputs_outputs": buffers["inputs_outputs"] - on_host_only,
            "reserve": RESERVE,
        },
        host={
            "graphs": on_host,
            "copies": host_copies(config) + on_host_only,
            "archive": archive_bytes(config, blocks),
            "checkpoint": checkpoint_bytes(config),
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


def choose(
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
    """The plans that `choose` considers, best first; the module's docstring has the order.

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
