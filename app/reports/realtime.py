"""Plans for frames per second, for people: tables of trade-offs, and the commands that make one."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from packforcing.app.reports.tables import make_table
from packforcing.checkpoints.published import AUTOENCODER_PARTS, PARTS, PUBLISHED
from packforcing.config import Config
from packforcing.presets import MODELS, policies
from packforcing.runtime.gpus import GpuFigures
from packforcing.runtime.plan import JETSON_TARGETS
from packforcing.runtime.realtime import AXES, Candidate
from packforcing.units import format_gib

if TYPE_CHECKING:
    from rich.console import RenderableType

HEADS = ("size", "steps", "sink + mid + recent", "weights", "cache", "attention", "GiB", "fps",
         "at 100%", "model")  # fmt: skip
JUSTIFY = "llrllllrrrll"
STORED = "statistics.safetensors"


def _cells(candidate: Candidate, gpu: GpuFigures, efficiency: float) -> tuple[str, ...]:
    config, precision = candidate.config, candidate.config.precision
    policy = config.policy
    return (
        f"{config.width}x{config.height}",
        f"{len(config.timesteps)}",
        f"{policy.sink} + {policy.mid} + {policy.recent}",
        precision.weights,
        precision.cache,
        precision.attention_products,
        format_gib(candidate.total),
        f"{candidate.fps(gpu, efficiency):.1f}",
        f"{candidate.fps(gpu):.1f}",
        config.name,
    )


def trade_off_table(
    chosen: Sequence[Candidate],
    gpu: GpuFigures,
    goal: float,
    budget: int,
    efficiency: float,
    left_out: Sequence[str],
) -> Iterator[RenderableType]:
    """Lay out the chosen candidate, its alternatives and the commands that make it.

    Args:
        chosen: What is chosen, and alternatives.
        gpu: The GPU.
        goal: Frames per second.
        budget: Bytes of its memory.
        efficiency: Share of its peak.
        left_out: What was no candidate, as nothing has measured it.
    """
    yield (
        f"{gpu.name} ({gpu.target}): {goal:g} fps or more within {format_gib(budget)} GiB, "
        f"predicted at {efficiency:.0%} of the GPU's peak"
    )
    yield ""
    rows = [
        ("chosen" if number == 0 else "or", *_cells(one, gpu, efficiency), _given_up(one))
        for number, one in enumerate(chosen)
    ]
    yield make_table(rows, ("", *HEADS, "given up"), JUSTIFY)
    yield ""
    yield from _left_out_lines(left_out)
    yield "It is made by"
    yield ""
    yield from (f"  {command}" for command in commands(chosen[0].config, gpu.target))
    if chosen[0].config.name not in PUBLISHED:
        yield ""
        yield (
            f"No weights are published for {chosen[0].config.name}: random ones serve for timing. "
            "--model plans for a published model"
        )


def all_gpus_table(
    rows: Sequence[tuple[GpuFigures, Candidate | None]],
    goal: float,
    efficiency: float,
    left_out: Sequence[str],
) -> Iterator[RenderableType]:
    """Lay out what is chosen for each GPU; the arguments are those of `trade_off_table`."""
    yield f"{goal:g} fps or more, predicted at {efficiency:.0%} of the GPU's peak"
    yield ""
    cells = (
        (gpu.name, *(_cells(one, gpu, efficiency) if one else ("nothing reaches it",)))
        for gpu, one in rows
    )
    yield make_table(cells, ("GPU", *HEADS), JUSTIFY)
    if left_out:
        yield ""
        yield from list(_left_out_lines(left_out))[:-1]


def _left_out_lines(left_out: Sequence[str]) -> Iterator[str]:
    """Say what was left out, why, and how to allow it; then an empty line."""
    if left_out:
        yield (
            "Left out, as their loss over two minutes has not been measured: "
            f"{', '.join(left_out)}. --unmeasured allows them"
        )
        yield ""


def allow(left_out: Sequence[str]) -> str:
    """Name what was left out, and the option that allows it."""
    return f"{', '.join(left_out)} with --unmeasured (their loss has not been measured)"


def _given_up(candidate: Candidate) -> str:
    """Name what is not whole, first what was given up last."""
    return ", ".join(axis for axis, loss in zip(AXES, candidate.losses) if loss) or "-"


def realtime_json(
    rows: Sequence[tuple[GpuFigures, Sequence[Candidate]]],
    goal: float,
    efficiency: float,
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Describe plans for frames per second for programs; the first of each GPU is chosen."""
    return {
        "goal": goal,
        "efficiency": efficiency,
        "left_out": [*left_out],
        "gpus": [
            {
                "name": gpu.name,
                "target": gpu.target,
                "candidates": [
                    {
                        "config": msgspec.to_builtins(one.config),
                        "total": one.total,
                        "fps": one.fps(gpu, efficiency),
                        "fps_at_peak": one.fps(gpu),
                        "given_up": dict(zip(AXES, one.losses)),
                        "commands": commands(one.config, gpu.target),
                    }
                    for one in chosen
                ],
            }
            for gpu, chosen in rows
        ],
    }


def commands(config: Config, target: str) -> list[str]:
    """Return the commands that export, quantize, build and verify a config, ready to be typed."""
    steps, weights = _fetching(config)
    precision, plain = config.precision, "fp16"
    bundle = plain if _is_quantized(config) else "fast"
    steps.append(["export", *weights, *_shape(config), "--out", bundle])
    if _is_quantized(config):
        prompts = "prompts.txt"
        if config.text_encoder == "umt5-xxl":
            prompts, encoder = "fox.safetensors", "downloads/umt5-xxl"
            steps.append(["fetch", "umt5-xxl", "--out", encoder])
            steps.append(["encode-prompt", "a fox in the snow", "--encoder", encoder,
                          "--out", prompts])  # fmt: skip
        steps.append(["calibrate", "--bundle", plain, "--prompts", prompts, "--out", STORED])
        dtypes = {
            "--weight-dtype": precision.weights,
            "--cache-dtype": precision.cache,
            "--attention-dtype": precision.attention_products,
        }
        chosen = [
            word
            for option, dtype in dtypes.items()
            if dtype != precision.compute
            for word in (option, dtype)
        ]
        steps.append(["quantize", "--bundle", plain, *chosen, "--calibration", STORED,
                      "--out", "fast"])  # fmt: skip
    if target in JETSON_TARGETS:  # on the device
        steps.append(["build", "--bundle", "fast", "--backend", "tensorrt"])
    else:
        steps.append(["build", "--bundle", "fast", "--target", target])
    steps.append(["verify", "--bundle", "fast"])
    return [shlex.join(["packforcing", *words]) for words in steps]


def _is_quantized(config: Config) -> bool:
    precision = config.precision
    return {precision.weights, precision.cache, precision.attention_products} != {precision.compute}


def _fetching(config: Config) -> tuple[list[list[str]], list[str]]:
    """Return the commands that fetch a model's weights, and the options that export them."""
    published = PUBLISHED.get(config.name)
    if published is None or not published.source:
        return [], [
            "--model",
            config.name,
            *([] if config.name == "demo" else ["--random-weights"]),
        ]
    decoder = AUTOENCODER_PARTS[config.vae]
    steps, files = [], []
    for name, row in ((config.name, published), (decoder, PARTS[decoder])):
        folder = f"downloads/{name}"
        steps.append(["fetch", name, "--out", folder])
        files += [f"{folder}/{file}" for file in row.files]
    steps.append(["import-checkpoint", *files, "--out", config.name])
    return steps, ["--weights", config.name]


def _shape(config: Config) -> list[str]:
    """Return the options of `export` by which a config differs from its model."""
    model = MODELS[config.name]
    words = []
    if (config.width, config.height) != (model.width, model.height):
        words += ["--size", f"{config.width}x{config.height}"]
    if config.precision.compute != model.precision.compute:
        words += ["--dtype", config.precision.compute]
    if config.block_frames != model.block_frames:
        words += ["--block-frames", f"{config.block_frames}"]
    policy = config.policy
    history = {name: getattr(policy, name) for name in ("sink", "mid", "recent")}
    for name, named in {"": model.policy, **policies(model)}.items():
        if msgspec.structs.replace(named, **history, commit=policy.commit) == policy:
            words += ["--policy", name] if name else []
            if msgspec.structs.replace(named, commit=policy.commit) != policy:
                words += ["--history", ",".join(map(str, history.values()))]
            break
    if config.vae != model.vae and config.name not in PUBLISHED:
        words += ["--vae", config.vae]
    for option, name in (("--steps", "timesteps"), ("--first-steps", "first_timesteps")):
        if getattr(config, name) != getattr(model, name):
            words += [option, ",".join(f"{step:g}" for step in getattr(config, name))]
    if policy.commit != model.policy.commit:
        words += ["--commit", policy.commit]
    if config.shift != model.shift:
        words += ["--shift", f"{config.shift:g}"]
    return words
