"""What `plan --fps` does: choose a GPU's figures and print the best trade-offs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from packforcing.app.cli.output import print_json, print_tables
from packforcing.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from packforcing.config import Config, Precision
    from packforcing.runtime.gpus import GpuFigures


MAX_FPS = 1000
# Options that keep what may be given up otherwise
KEPT_BY = {
    "size": ("size",),
    "steps": ("policy", "block_frames", "steps", "first_steps", "shift"),
    "history": ("history", "policy"),
    "commit": ("commit",),
}


def free_axes(
    model: str | None, dtypes: Precision | None, shape: Mapping[str, Any]
) -> frozenset[str]:
    """Return of what something may be given up: of what no option sets."""
    from packforcing.runtime.realtime import AXES

    fixed = {axis for axis, names in KEPT_BY.items() if any(shape[name] for name in names)}
    return frozenset(AXES) - fixed - {"steps" if model else "", "precision" if dtypes else ""}


def plan_frame_rate(
    config: Config,
    fps: float,
    efficiency: float | None,
    gpu: str | None,
    target: tuple[str, ...] | None,
    budget: tuple[int, ...] | None,
    rates: str | None,
    as_json: bool,
    free: Collection[str],
    unmeasured: bool,
) -> None:
    """Print what reaches a number of frames per second, on one GPU or on all.

    Dtypes whose loss has not been measured are left out, and named, unless `unmeasured` is set.

    Raises:
        ConfigError: The options do not say of which GPU, or there are no figures for it.
        PlanError: Nothing reaches it on the GPU.
    """
    from packforcing.app.reports import realtime as report
    from packforcing.runtime.gpus import known_gpus
    from packforcing.runtime.nvml import UNIFIED_TARGETS
    from packforcing.runtime.plan import JETSON_TARGETS, TARGETS, check_target, memory_budget
    from packforcing.runtime.realtime import (
        EFFICIENCY,
        Candidate,
        candidates,
        first_candidate,
        left_out,
        trade_offs,
    )

    efficiency = EFFICIENCY if efficiency is None else efficiency
    for option, value, most in (("--fps", fps, MAX_FPS), ("--efficiency", efficiency, 1)):
        if not 0 < value <= most:
            raise ConfigError(f"{option} must be above 0 and at most {most}; it is {value:g}")
    one_gpu = _chosen_gpu(gpu, target, budget, rates)
    if one_gpu is not None:
        check_target(config.precision, one_gpu.target)
    options = candidates(config, free, unmeasured)
    lacking: list[str] = []
    if not unmeasured and "precision" in free and config.precision.compute == "fp16":
        named = map(left_out, [one_gpu.target] if one_gpu else TARGETS)
        lacking = list(dict.fromkeys(chain.from_iterable(named)))

    @cache
    def options_on(target: str) -> list[Candidate]:
        """Return the candidates for a target, with what the host takes where they share memory."""
        if target not in UNIFIED_TARGETS:
            return options
        return [
            one._replace(total=one.total + _host_bytes(one.config))
            for one in options
            if not (target in JETSON_TARGETS and one.config.precision.weights == "int8")
        ]

    if one_gpu is None:
        rows = [
            (
                each,
                first_candidate(
                    options_on(each.target),
                    each,
                    fps,
                    memory_budget(each.memory_bytes, each.target),
                    efficiency,
                ),
            )
            for each in known_gpus().values()
        ]
        if as_json:
            listed = [(each, [one] if one else []) for each, one in rows]
            print_json(report.realtime_json(listed, fps, efficiency, lacking))
        else:
            print_tables(*report.all_gpus_table(rows, fps, efficiency, lacking))
        return
    budget_bytes = budget[0] if budget else memory_budget(one_gpu.memory_bytes, one_gpu.target)
    try:
        chosen = trade_offs(options_on(one_gpu.target), one_gpu, fps, budget_bytes, efficiency)
    except PlanError as error:
        if lacking:
            raise PlanError(f"{error}; or allow {report.allow(lacking)}", error.smallest) from None
        raise
    if as_json:
        print_json(report.realtime_json([(one_gpu, chosen)], fps, efficiency, lacking))
    else:
        tables = report.trade_off_table(chosen, one_gpu, fps, budget_bytes, efficiency, lacking)
        print_tables(*tables)


def _host_bytes(config: Config) -> int:
    """Return the bytes of the host beside a GPU that shares its memory, for a minute of video.

    They depend on size, history and cache, not on the commit or the dtypes of weights and products.
    """
    import msgspec

    from packforcing.config import Precision

    precision = config.precision
    plain = Precision(compute=precision.compute, weights=precision.compute, cache=precision.cache)
    policy = msgspec.structs.replace(config.policy, commit="clean")
    return _plain_host_bytes(msgspec.structs.replace(config, precision=plain, policy=policy))


@lru_cache(4096)
def _plain_host_bytes(config: Config) -> int:
    from packforcing.runtime.nvml import UNIFIED_TARGETS
    from packforcing.runtime.plan import make_plan

    return sum(make_plan(config, UNIFIED_TARGETS[0]).host.values())  # the same on all of them


def _chosen_gpu(
    gpu: str | None,
    target: tuple[str, ...] | None,
    budget: tuple[int, ...] | None,
    rates: str | None,
) -> GpuFigures | None:
    """Return the GPU that options name or describe; None where they do neither."""
    from packforcing.runtime.gpus import find_gpu, parse_rates
    from packforcing.units import GIB

    if budget and len(budget) > 1:
        raise ConfigError("--fps takes one --budget")
    if gpu is not None:
        if target or rates:
            raise ConfigError("choose --gpu, or --target, --budget and --rates")
        return find_gpu(gpu)
    if not (target or budget or rates):
        return None
    if not (target and budget and rates) or len(target) > 1:
        raise ConfigError(
            "--fps needs a --gpu, or one --target, --budget and --rates of it; without any of them "
            "it lists all known GPUs"
        )
    return parse_rates(rates, target[0], budget[0] / GIB)
