"""The page about a comparison of policies or bundles, and its tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from packforcing.app.reports.page import (
    picture_url,
    read_paths,
    runtime_versions,
    sample_frames,
    save_page,
)
from packforcing.app.reports.plan import plan_figure
from packforcing.app.reports.plots import COLORS, loss_plots, measure_plots, plot_style, svg
from packforcing.app.reports.tables import make_table
from packforcing.calibration.recipes import OutputLoss
from packforcing.config import Policy
from packforcing.evaluation.compare import (
    CLOSE,
    END,
    TARGET,
    Comparison,
    Costs,
    Row,
    Summary,
    config_for_video,
)
from packforcing.evaluation.intervals import Estimate, estimate_mean
from packforcing.evaluation.measures import ALL_MEASURES, SEGMENT, format_value
from packforcing.runtime.plan import make_plan
from packforcing.units import format_file_size, format_memory

if TYPE_CHECKING:
    from rich.console import RenderableType

SHEETS, SAMPLES = 8, 10  # prompts, and frames of each video
SAMPLE_WIDTH = 160  # pixels
MIN_PROMPTS = 6  # for a verdict: by chance, all differences have one sign in 3% of cases
WORST_MATRICES = 12  # of a quantized bundle
ARROWS = {"higher": " \u2191", "lower": " \u2193"}


def write_report(folder: Path, comparison: Comparison) -> Path:
    """Write compare.html into the folder of the videos; return its path.

    Raises:
        OutputError: The page cannot be written.
    """
    page = folder / "compare.html"
    config, names = comparison.config, list(comparison.costs)
    prompts = {pair.number: pair.prompt for pair in comparison.pairs}
    costs = {name: _costs(cost) for name, cost in comparison.costs.items()}
    save_page(
        page,
        "compare.html.j2",
        model=config.name,
        names=names,
        colors=COLORS,
        about=_about(comparison, len(prompts)),
        fewest=MIN_PROMPTS,
        end_seconds=f"{min(END, comparison.seconds):g}",
        end_table=list(_measure_rows(comparison.end)),
        whole_table=list(_measure_rows(comparison.whole)),
        **_quantization(comparison),
        cost_heads=list(costs[names[0]]),
        costs={name: tuple(cells.values()) for name, cells in costs.items()},
        plots=list(measure_plots(comparison)),
        segment_seconds=f"{SEGMENT:g}",
        sheets=[_sheet(folder, comparison, number) for number in sorted(prompts)[:SHEETS]],
        maps=list(_read_maps(comparison)),
        plan=_plan_picture(comparison),
        meanings={
            measure.head: (measure.title, measure.better, measure.meaning)
            for measure in ALL_MEASURES.values()
        },
        versions={"Rendered with": runtime_versions(), "Bundle": comparison.bundle},
    )
    return page


def tables(comparison: Comparison) -> Iterator[RenderableType]:
    """Lay out measures of the last seconds and costs, a row per policy or bundle."""
    first = next(iter(comparison.costs))
    measured = set().union(*comparison.end.values())
    names = [name for name in ALL_MEASURES if name in measured]
    yield f"10-second segments of the last {min(END, comparison.seconds):g} s, mean over prompts"
    yield make_table(
        ((policy, *(_mean(row[name]) for name in names)) for policy, row in comparison.end.items()),
        ("", *(ALL_MEASURES[name].head for name in names)),
        "lr",
    )
    costs = {policy: _costs(cost) for policy, cost in comparison.costs.items()}
    yield ""
    yield make_table(
        ((policy, *cells.values()) for policy, cells in costs.items()), ("", *costs[first]), "lr"
    )
    if comparison.fidelity:
        yield ""
        yield f"first {CLOSE:g} s against {first}, mean over prompts, and worst"
        yield make_table((bundle, *cells) for bundle, cells in _fidelity(comparison).items())
        yield ""
        yield f"lowest SQNR of the denoiser's outputs against {first}'s"
        if comparison.unmeasured:
            yield f"not measured: {comparison.unmeasured}"
    if comparison.outputs:
        yield make_table(
            (bundle, *_lowest_snr_by_kind(losses)) for bundle, losses in comparison.outputs.items()
        )


def _mean(row: Row) -> str:
    return format_value(None if row.value is None else row.value.mean)


def _lowest_snr_by_kind(losses: Mapping[str, OutputLoss]) -> Iterator[str]:
    """Yield the lowest SQNR of all layers for each kind of output, like k_new."""
    kinds: dict[str, list[float]] = {}
    for output, loss in losses.items():
        ratios = kinds.setdefault(output.partition(".")[0], [])
        if loss.snr is not None:
            ratios.append(loss.snr)
    for kind, ratios in kinds.items():
        yield f"{kind} {_decibels(min(ratios, default=None))}"


def _decibels(ratio: float | None) -> str:
    return "equal" if ratio is None else f"{ratio:.1f} dB"


def _fidelity(comparison: Comparison) -> dict[str, tuple[str, ...]]:
    """Describe PSNR, SSIM and GMSD of each bundle: the mean, its interval, the worst prompt."""
    cells: dict[str, tuple[str, ...]] = {}
    for name, prompts in comparison.fidelity.items():
        parts = []
        for head, unit, values, worst in (
            ("PSNR", " dB", [one.psnr for one in prompts if one.psnr is not None], min),
            ("SSIM", "", [one.ssim for one in prompts], min),
            ("GMSD", "", [one.gmsd for one in prompts], max),
        ):
            mean = estimate_mean(values)
            parts.append(
                f"{head} {mean.mean:.4g}{unit}{_interval(mean, '.4g')}, worst {worst(values):.4g}"
                if mean
                else f"{head}: equal"
            )
        cells[name] = tuple(parts)
    return cells


def _costs(cost: Costs) -> dict[str, str]:
    return {
        "bundle": format_file_size(cost.bundle),
        "tokens read": f"{cost.tokens_read:,}",
        "ms per block": f"{cost.block_seconds * 1e3:.0f}",
        "ms at the end": f"{cost.last_block_seconds * 1e3:.0f}",
        "host buffers": format_memory(cost.buffers),
        "archive": format_memory(cost.archive),
        "host peak": format_memory(cost.host_peak),
        f"GPU, planned for {TARGET}": format_memory(cost.device),
    }


def _about(comparison: Comparison, prompts: int) -> dict[str, str]:
    config, names = comparison.config, list(comparison.costs)
    kind = "bundles" if comparison.fidelity else "policies"
    few = f". Fewer than {MIN_PROMPTS} prompts prove little" if prompts < MIN_PROMPTS else ""
    return {
        "Model": f"{config.name}, {config.width}x{config.height}, {config.fps} frames/s",
        "Videos": f"{prompts} prompts of {comparison.seconds:g} s, each with the same seed for "
        f"{len(names)} {kind}",
        "Intervals": "95% of the means of 10,000 resamples of the prompts; differences are from "
        f"{names[0]}, prompt by prompt{few}",
    }


def _quantization(comparison: Comparison) -> dict[str, Any]:
    """Collect what the page says of quantized bundles; no fidelity where policies are compared."""
    first = next(iter(comparison.costs))
    prompts = {pair.number: pair.prompt for pair in comparison.pairs if pair.policy == first}
    bundles = comparison.fidelity.values()
    outputs = dict.fromkeys(name for losses in comparison.outputs.values() for name in losses)
    return {
        "fidelity": _fidelity(comparison),
        "close_seconds": f"{CLOSE:g}",
        "fidelity_by_prompt": {
            f"{number}: {prompt}": tuple(
                f"{_decibels(one.psnr)}, {one.ssim:.4f}, {one.gmsd:.4f}"
                for one in (by_prompt[number] for by_prompt in bundles)
            )
            for number, prompt in (prompts.items() if bundles else ())
        },
        "outputs": {
            output: tuple(
                f"{_decibels(losses[output].snr)}, {losses[output].error:.2g}"
                for losses in comparison.outputs.values()
            )
            for output in outputs
        },
        "unmeasured": f"Not measured: {comparison.unmeasured}" if comparison.unmeasured else "",
        "loss_plots": list(loss_plots(comparison)) if bundles else [],
        "worst_count": WORST_MATRICES,
        "worst": {
            name: {
                matrix: (_decibels(ratio),)
                for matrix, ratio in list(ratios.items())[:WORST_MATRICES]
            }
            for name, ratios in comparison.snr.items()
        },
    }


def _measure_rows(summary: Summary) -> Iterator[dict[str, Any]]:
    """Yield a row per measure with a cell per policy."""
    for name, measure in ALL_MEASURES.items():
        if any(name in measures for measures in summary.values()):
            yield {
                "title": measure.title,
                "arrow": ARROWS.get(measure.better, ""),
                "cells": [_cell(measures[name], measure.better) for measures in summary.values()],
            }


def _cell(row: Row, better: str) -> dict[str, str]:
    """Describe a mean, its interval, its difference from the baseline and a verdict on that."""
    if row.value is None:
        return {"mean": "-", "interval": "", "change": "", "verdict": ""}
    verdict, change = "", row.difference
    if better and change and change.prompts >= MIN_PROMPTS:
        assert change.low is not None and change.high is not None
        if change.low > 0 or change.high < 0:
            verdict = "better" if (change.low > 0) == (better == "higher") else "worse"
    return {
        "mean": format_value(row.value.mean),
        "interval": _interval(row.value).strip(),
        "change": f"{change.mean:+.2g}{_interval(change, '+.2g')}" if change else "",
        "verdict": verdict,
    }


def _interval(estimate: Estimate, form: str = ".3g") -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({estimate.low:{form}} to {estimate.high:{form}})"


def _sheet(folder: Path, comparison: Comparison, number: int) -> dict[str, Any]:
    """Collect the videos of a prompt: a strip of frames per policy."""
    pairs = [pair for pair in comparison.pairs if pair.number == number]
    strips = []
    for pair in pairs:
        frames = pair.evaluation.frames
        samples = sample_frames(folder / pair.video, frames, SAMPLES, SAMPLE_WIDTH)
        urls = [picture_url(picture, "jpeg") for _, picture in samples]
        strips.append({"name": pair.policy, "video": pair.video, "urls": urls})
    return {"title": f"{pairs[0].prompt} (seed {pairs[0].seed})", "strips": strips}


def _read_maps(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yield what each policy with an archive read, in the video of the first prompt."""
    for name, cost in comparison.costs.items():
        pair = next(pair for pair in comparison.pairs if pair.policy == name)
        if cost.policy.mid:
            yield {
                "title": f"{name}: {_history(cost.policy)}",
                "paths": read_paths(pair.read, cost.policy),
                "blocks": len(pair.read),
            }


def _history(policy: Policy) -> str:
    return f"{policy.sink} sink, {policy.mid} mid, {policy.recent} recent, {policy.selection}"


def _plan_picture(comparison: Comparison) -> str:
    """Draw what the policies take on a GPU, once for each history and precision."""
    costs = {
        (cost.policy.sink, cost.policy.mid, cost.policy.recent, str(cost.precision)): cost
        for cost in comparison.costs.values()
    }
    plans: list[Any] = []
    for cost in costs.values():
        config = msgspec.structs.replace(comparison.config, precision=cost.precision)
        config = config_for_video(config, cost.policy, comparison.seconds)
        plans.append((None, TARGET, make_plan(config, TARGET, seconds=comparison.seconds)))
    with plot_style():
        return svg(plan_figure(plans, comparison.config))
