"""Plan for a number of frames per second: what to give up so that a GPU keeps up.

Every combination of what may be given up is a candidate. They stand in one fixed order, and the
first that fits the GPU's memory, has only dtypes of its architecture and is predicted to reach the
goal is chosen. So a GPU with more of anything, or a lower goal, never gets a worse picture. This is
given up, first to last:

1. Precision: an 8-bit cache; then fp8 attention; then quantized weights, in the order of `WEIGHTS`,
   each first without and then with fp8 attention. Of these, only what `MEASURED_WEIGHTS` and
   `MEASURED_ATTENTION` list, unless the caller allows all.
2. The commit call, where `presets.PLANNED_COMMITS` allows it.
3. History: mid blocks to a quarter, then to one, then half of the sink blocks with all mids back.
   Never the recent blocks.
4. Steps: to a published model that was trained for fewer, but for more than one. No other model is
   sampled with fewer steps.
5. Size, to 77%, 58% and 50% of width and height.
6. All steps but one, with all sizes back.

At each step everything that comes before it is tried again. Streamed weights take time in every
call and are no candidate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import msgspec

from packforcing.config import Config, Policy, Precision
from packforcing.errors import ConfigError, PlanError
from packforcing.geometry import denoiser_operations
from packforcing.presets import MODELS, PLANNED_COMMITS, policies, with_autoencoder
from packforcing.runtime.estimate import (
    Call,
    calls,
    calls_per_block,
    scratch_bytes,
    seconds_at_rates,
    seconds_of_calls,
    weight_bytes,
)
from packforcing.runtime.gpus import GpuFigures
from packforcing.runtime.plan import TARGETS, device_rows
from packforcing.units import format_gib

# Predicted share of the peak that kernels reach. Published for attention: FlashAttention-3 in fp8
# 61% of an H100 (1.2 of 1.98 PFLOPS, arXiv:2407.08608), SageAttention3 in fp4 62% of an RTX 5090
# (1038 of 1676 TOPS, arXiv:2505.11594).
EFFICIENCY = 0.6
# Weights after the compute dtype, those that cost the least first. Which of them a GPU may have is
# in `plan.TARGETS`. int8 and int4 save memory alone.
WEIGHTS = ("int8", "w8a8", "fp8", "int4", "nvfp4")
ATTENTION: tuple[str | None, ...] = (None, "fp8")
# What may be chosen without being told to, beside an int8 cache: dtypes with which the demo's
# videos keep, over two minutes, within two points of what they show without, prompt by prompt
# (docs/results/2026-11-quantization.md).
MEASURED_WEIGHTS: tuple[str, ...] = ()
MEASURED_ATTENTION: tuple[str | None, ...] = (None,)
SCALES = (1, 0.77, 0.58, 0.5)  # of width and height
AXES = ("size", "steps", "history", "commit", "precision")  # the last one is given up first


class Candidate(NamedTuple):
    """A config that may be chosen.

    Attributes:
        config: The config.
        total: Bytes on the GPU.
        calls: Of a block.
        losses: How much is given up of each of `AXES`, from 0.
        least: Least bytes, and calls with the least of each figure, of those candidates that differ
            from it in precision alone.
    """

    config: Config
    total: int
    calls: tuple[Call, ...]
    losses: tuple[int, ...]
    least: tuple[int, tuple[Call, ...]]

    def fps(self, gpu: GpuFigures, efficiency: float = 1) -> float:
        """Predict the frames per second on a GPU that has its dtypes."""
        seconds = seconds_of_calls(self.calls, self.config.precision, gpu)
        return efficiency * self.config.block_pixel_frames / seconds

    def runs_on(self, gpu: GpuFigures) -> bool:
        """Tell whether a GPU has its dtypes."""
        precision = self.config.precision
        stored = {precision.weights, precision.cache, precision.attention} - {None, "fp32", "fp16"}
        computed = {precision.products, precision.attention_products, precision.compute}
        return stored <= {*TARGETS[gpu.target]} and computed <= gpu.tflops.keys()


def candidates(
    config: Config, free: Collection[str] = AXES, unmeasured: bool = False
) -> list[Candidate]:
    """List the candidates, the best picture first.

    Args:
        config: The model, with everything that may be kept.
        free: Those of `AXES` of which something may be given up.
        unmeasured: Allow dtypes whose loss over two minutes has not been measured.
    """
    models = list(enumerate(_models(config) if "steps" in free else [config]))
    one_step = [(loss, model) for loss, model in models if loss and len(model.timesteps) == 1]
    sizes = list(enumerate(_sizes(config) if "size" in free else [{}]))
    levels = _precisions(config, unmeasured) if "precision" in free else [config.precision]
    options = []
    for group in ([one for one in models if one not in one_step], one_step):
        for (size_loss, size), (steps_loss, model) in product(sizes, group):
            for policy_losses, policy in _policies(model.policy, free):
                try:
                    shape = msgspec.structs.replace(model, policy=policy, **size)
                except ConfigError:  # too small a picture to compress
                    continue
                configs = [msgspec.structs.replace(shape, precision=level) for level in levels]
                needs = _needs(configs)
                least = (
                    min(total for total, _ in needs),
                    _least_calls([block for _, block in needs]),
                )
                options += [
                    Candidate(
                        config, total, block, (size_loss, steps_loss, *policy_losses, loss), least
                    )
                    for loss, (config, (total, block)) in enumerate(zip(configs, needs))
                ]
    return options


def trade_offs(
    options: Sequence[Candidate],
    gpu: GpuFigures,
    goal: float,
    budget: int,
    efficiency: float = EFFICIENCY,
) -> list[Candidate]:
    """Return the chosen candidate, and after it the first that keep one thing whole.

    Args:
        options: What `candidates` returned.
        gpu: The GPU.
        goal: Frames per second that are to be predicted.
        budget: Bytes of its memory.
        efficiency: Share of the peak that kernels reach.

    Raises:
        ConfigError: The GPU lacks the dtypes.
        PlanError: None reaches the goal, or fits; the message has the closest.
    """
    reaching = list(_reaching(options, gpu, goal, budget, efficiency))
    if not reaching:
        runnable = [one for one in options if one.runs_on(gpu)]
        if not runnable:
            described = describe_candidate(options[0])
            raise ConfigError(f"{gpu.name} lacks a dtype of these: {described}")
        fitting = [one for one in runnable if one.total <= budget]
        raise PlanError(*_nothing(runnable, fitting, gpu, goal, budget, efficiency))
    chosen = reaching[:1]
    for axis in range(len(AXES)):
        chosen += [one for one in reaching if one.losses[axis] == 0][:1]
    return list({one.losses: one for one in chosen}.values())


def first_candidate(
    options: Sequence[Candidate],
    gpu: GpuFigures,
    goal: float,
    budget: int,
    efficiency: float = EFFICIENCY,
) -> Candidate | None:
    """Return the chosen candidate alone, or None where nothing reaches the goal."""
    return next(_reaching(options, gpu, goal, budget, efficiency), None)


def _reaching(
    options: Sequence[Candidate], gpu: GpuFigures, goal: float, budget: int, efficiency: float
) -> Iterator[Candidate]:
    """Yield the candidates that a GPU has the dtypes for, that fit, and that reach a goal.

    Most shapes are out of reach in every precision. They are told by one bound for all: their least
    bytes and work, at the best rates of the GPU.
    """
    precisions = {one.config.precision: one for one in options}
    runs = {precision for precision, one in precisions.items() if one.runs_on(gpu)}
    if not runs:
        return
    rates = (
        max(gpu.tflops[precision.products] for precision in runs),
        max(gpu.tflops[precision.attention_products] for precision in runs),
        max(gpu.tflops[precision.compute] for precision in runs),
        gpu.bandwidth,
    )
    bound, possible = None, False
    for one in options:
        if one.least is not bound:
            bound = one.least
            total, block = bound
            work = one.config.block_pixel_frames * efficiency
            # a hair of tolerance, as it is added up in another order
            possible = total <= budget and goal * seconds_at_rates(block, *rates) < work * 1.0001
        if (
            possible
            and one.total <= budget
            and one.config.precision in runs
            and one.fps(gpu, efficiency) >= goal
        ):
            yield one


def _least_calls(blocks: Sequence[tuple[Call, ...]]) -> tuple[Call, ...]:
    """Return calls with the least of each figure of calls of the same graphs."""
    return tuple(Call(*map(min, zip(*calls))) for calls in zip(*blocks))


def _nothing(
    runnable: Sequence[Candidate],
    fitting: Sequence[Candidate],
    gpu: GpuFigures,
    goal: float,
    budget: int,
    efficiency: float,
) -> tuple[str, int]:
    """Return the text of an error, and the bytes of the closest candidate."""
    if not fitting:
        least = min(runnable, key=lambda one: one.total)
        smallest = format_gib(least.total, round_up=True)
        return (
            f"nothing fits into {format_gib(budget)} GiB on {gpu.name}: the least it can take is "
            f"{smallest} GiB; give --budget {smallest} or more",
            least.total,
        )
    best = max(fitting, key=lambda one: one.fps(gpu))
    fps = best.fps(gpu, efficiency)
    return (
        f"nothing is predicted to reach {goal:g} fps on {gpu.name}: the fastest is {fps:.1f} fps, "
        f"with {describe_candidate(best)}; give --fps {int(10 * fps) / 10:g}, or free what other "
        "options fix",
        best.total,
    )


def describe_candidate(candidate: Candidate) -> str:
    """Describe a candidate in a line."""
    config, precision = candidate.config, candidate.config.precision
    policy = config.policy
    return ", ".join(
        (
            f"{config.name} at {config.width}x{config.height}",
            f"{len(config.timesteps)} steps",
            f"{policy.sink} + {policy.mid} + {policy.recent} blocks",
            f"{precision.weights} weights",
            f"{precision.cache} cache",
            f"{precision.attention_products} attention",
        )
    )


@lru_cache(64)
def _needs_of_shape(config: Config) -> tuple[int, tuple[Call, ...]]:
    rows = device_rows(config)
    return sum(rows.values()) - rows["scratch"], tuple(calls(config))


def _plain_needs(config: Config) -> tuple[int, tuple[Call, ...]]:
    """Return the bytes beside scratch, and the calls, of a config without quantized weights.

    Both grow by the same with every token of context. So they are counted for two short histories
    of each size and model, and all others follow, to the byte.
    """
    policy = config.policy
    short = msgspec.structs.replace(policy, sink=1, mid=min(policy.mid, 1), commit="clean")
    shapes = [
        msgspec.structs.replace(config, policy=msgspec.structs.replace(short, sink=sink))
        for sink in (1, 2)
    ]
    (total, block), (longer_total, longer_block) = map(_needs_of_shape, shapes)
    tokens = config.context_tokens - shapes[0].context_tokens
    step = shapes[1].context_tokens - shapes[0].context_tokens
    times = calls_per_block(config).values()
    return total + (longer_total - total) * tokens // step, tuple(
        call._replace(times=count, moved=call.moved + (longer.moved - call.moved) * tokens // step)
        for call, longer, count in zip(block, longer_block, times)
    )


@lru_cache(64)
def _denoiser_bytes(model: Config, precision: Precision) -> int:
    return weight_bytes(msgspec.structs.replace(model, precision=precision))["denoiser"]


def _needs(configs: Sequence[Config]) -> list[tuple[int, tuple[Call, ...]]]:
    """Return the bytes and the calls of configs that differ in precision alone.

    Beside scratch, the dtypes of weights and attention change the bytes of the denoiser's weights
    alone, whatever the size of the picture and the history, so the rest is counted once for each
    dtype of the cache.
    """
    model = MODELS.get(configs[0].name, configs[0])
    counted: dict[Precision, tuple[int, tuple[Call, ...]]] = {}
    operations: dict[tuple[int, str | None], dict[str, int]] = {}
    result = []
    for config in configs:
        precision = config.precision
        plain = msgspec.structs.replace(precision, weights=precision.compute, attention=None)
        if plain not in counted:
            counted[plain] = _plain_needs(msgspec.structs.replace(config, precision=plain))
        total, block = counted[plain]
        saved = _denoiser_bytes(model, plain) - _denoiser_bytes(model, precision)
        calls_of_level = []
        for call in block:
            if call.new_tokens:
                which = call.new_tokens, precision.attention
                if which not in operations:
                    operations[which] = denoiser_operations(config, call.new_tokens)
                call = call._replace(**operations[which], moved=call.moved - saved)
            calls_of_level.append(call)
        scratch = max(scratch_bytes(config).values())
        result.append((total - saved + scratch, tuple(calls_of_level)))
    return result


def _sizes(config: Config) -> list[dict[str, int]]:
    """Return widths and heights, the largest first."""
    cell = config.spatial_factor * config.patch
    return [
        {
            side: max(cell, round(getattr(config, side) * scale / cell) * cell)
            for side in ("width", "height")
        }
        for scale in SCALES
    ]


def _models(config: Config) -> list[Config]:
    """Return the config, and published models of the same transformer trained for fewer steps.

    They have its size, autoencoder and precision, and the paper's history where it compresses.
    """
    same = ("dim", "heads", "layers", "ffn_dim", "latent_channels", "text_dim", "sampler")
    faster = {
        len(model.timesteps): model
        for model in reversed(MODELS.values())
        if all(getattr(model, name) == getattr(config, name) for name in same)
        and len(model.timesteps) < len(config.timesteps)
    }
    shape: dict[str, Any] = {
        name: getattr(config, name) for name in ("width", "height", "fps", "precision")
    }
    return [
        config,
        *(
            with_autoencoder(
                msgspec.structs.replace(
                    faster[steps],
                    policy=policies(faster[steps])["packforcing"]
                    if config.policy.mid
                    else faster[steps].policy,
                    **shape,
                ),
                config.vae,
            )
            for steps in sorted(faster, reverse=True)
        ),
    ]


def _policies(policy: Policy, free: Collection[str]) -> Iterator[tuple[tuple[int, int], Policy]]:
    """Yield policies with what they give up of history and of the commit, the best first."""
    histories = _histories(policy) if "history" in free else [policy]
    for loss, smaller in enumerate(histories):
        commits = (policy.commit, *(PLANNED_COMMITS if "commit" in free else ()))
        for commit_loss, commit in enumerate(dict.fromkeys(commits)):
            yield (loss, commit_loss), msgspec.structs.replace(smaller, commit=commit)


def _histories(policy: Policy) -> Iterator[Policy]:
    """Yield a policy with less and less history."""
    sink = policy.sink
    while True:
        for mid in dict.fromkeys((policy.mid, (policy.mid + 3) // 4, min(policy.mid, 1))):
            yield msgspec.structs.replace(policy, sink=sink, mid=mid)
        if sink <= 1:
            return
        sink = (sink + 1) // 2


def _precisions(config: Config, unmeasured: bool = False) -> list[Precision]:
    """Return the precisions, the best first."""
    full = config.precision.compute
    weights = [name for name in WEIGHTS if unmeasured or name in MEASURED_WEIGHTS]
    attentions = ATTENTION if unmeasured else MEASURED_ATTENTION
    levels: list[tuple[str, str, str | None]] = [(full, full, None)]
    if full == "fp16":
        levels += [(name, "int8", dtype) for name in (full, *weights) for dtype in attentions]
    return [
        Precision(compute=full, weights=name, cache=cache, attention=attention)  # type: ignore[arg-type]
        for name, cache, attention in levels
    ]


def left_out(target: str) -> list[str]:
    """Name the dtypes that a GPU has and that `candidates` leaves out unless told otherwise.

    Args:
        target: The GPU's architecture.
    """
    weights = [name for name in WEIGHTS if name not in MEASURED_WEIGHTS]
    attentions = [name for name in ATTENTION if name and name not in MEASURED_ATTENTION]
    return [
        f"{name} {part}"
        for part, names in (("weights", weights), ("attention", attentions))
        for name in names
        if name in TARGETS[target]
    ]
