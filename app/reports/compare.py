"""The page about a comparison of policies or bundles, and its tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from packforcing.app.reports.page import (
    picture_url,
    read_paths,
    runtime_versions,
    sample_frames,
    save_page,
)
from packforcing.app.reports.plan import COLORS as PLAN_COLORS
from packforcing.app.reports.plan import plan_figure
from packforcing.app.reports.plots import COLORS, loss_plots, measure_plots, plot_style, svg
from packforcing.app.reports.tables import make_table
from packforcing.calibration.recipes import OutputLoss
from packforcing.config import Config, Policy
from packforcing.evaluation.compare import (
    CLOSE,
    END,
    TARGET,
    Comparison,
    Costs,
    Pair,
    Row,
    Summary,
    config_for_video,
)
from packforcing.evaluation.intervals import Estimate, estimate_mean
from packforcing.evaluation.measures import ALL_MEASURES, SEGMENT, format_value
from packforcing.runtime.plan import make_plan
from packforcing.runtime.video_files import open_video
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
    prompts = sorted({pair.number for pair in comparison.pairs})
    urls = {
        (pair.number, pair.policy): _url(_playable_video(folder, pair, config))
        for pair in comparison.pairs
    }
    end_table = list(_measure_rows(comparison.end))
    verdict_table = [row for row in end_table if any(cell["verdict"] for cell in row["cells"])]
    costs = {name: _costs(cost) for name, cost in comparison.costs.items()}
    plots, constants = measure_plots(comparison)
    save_page(
        page,
        "compare.html.j2",
        model=config.name,
        names=names,
        colors=len(COLORS),
        videos=_videos(comparison, len(prompts)),
        prompts=[
            {"title": _title(comparison, number), "urls": [urls[number, name] for name in names]}
            for number in prompts
        ],
        frames=comparison.pairs[0].evaluation.frames,
        fps=config.fps,
        width=config.width,
        height=config.height,
        verdict=_verdict(comparison, verdict_table, len(prompts)),
        verdict_table=verdict_table,
        fewest=MIN_PROMPTS,
        end_seconds=_end_seconds(comparison),
        end_table=end_table,
        whole_table=list(_measure_rows(comparison.whole)),
        **_quantization(comparison),
        cost_heads=list(costs[names[0]]),
        costs={name: tuple(cells.values()) for name, cells in costs.items()},
        plots=plots,
        constants=constants,
        segment_seconds=f"{SEGMENT:g}",
        sheets=[_sheet(folder, comparison, number, urls) for number in prompts[:SHEETS]],
        maps=list(_read_maps(comparison)),
        plan=_plan_picture(comparison),
        meanings={
            measure.head: (measure.title, measure.better, measure.meaning)
            for measure in ALL_MEASURES.values()
        },
        about={
            "Model": f"{config.name}, {config.width}x{config.height}, {config.fps} frames/s",
            "Bundle": comparison.bundle,
            "Intervals": "95% of the means of 10,000 resamples of the prompts; differences are "
            f"from {names[0]}, prompt by prompt",
            "Rendered with": runtime_versions(),
        },
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


def _videos(comparison: Comparison, prompts: int) -> str:
    """Say in a line what the videos are of."""
    length = f"{prompts} prompt{'s' * (prompts > 1)} of {comparison.seconds:g} s"
    kind = "bundles" if comparison.fidelity else "policies"
    count = len(comparison.costs)
    return f"{length}, each with the same seed for {count} {kind}." if count > 1 else f"{length}."


def _end_seconds(comparison: Comparison) -> str:
    return f"{min(END, comparison.seconds):g}"


def _title(comparison: Comparison, number: int) -> str:
    pair = next(pair for pair in comparison.pairs if pair.number == number)
    return f"{pair.prompt} (seed {pair.seed})"


def _playable_video(folder: Path, pair: Pair, config: Config) -> str:
    """Return the video for a page; browsers play no lossless one, so that has a copy beside it."""
    import av

    video = folder / pair.video
    copy = video.with_suffix(".mp4")
    if not copy.exists():
        with (
            av.open(video) as source,
            open_video(copy, config.width, config.height, config.fps) as writer,
        ):
            for frame in source.decode(video=0):
                writer.write(frame.to_ndarray(format="rgb24")[None])
    return copy.relative_to(folder).as_posix()


def _url(path: str) -> str:
    return quote(path, errors="replace")  # a name may hold lone surrogates


def _verdict(comparison: Comparison, rows: Sequence[object], prompts: int) -> str:
    """Say what the rows of the verdict's table are, or why there is none."""
    first, seconds = next(iter(comparison.costs)), _end_seconds(comparison)
    if prompts < MIN_PROMPTS:
        return f"A verdict takes {MIN_PROMPTS} prompts or more; this comparison has {prompts}."
    if not rows:
        return (
            f"No measure of the last {seconds} seconds differs clearly from {first}'s: every "
            "interval of the differences includes zero."
        )
    return (
        f"Measures of the last {seconds} seconds that differ from {first}'s, prompt by prompt: the "
        "95% interval of the difference, in parentheses, excludes zero. By chance alone one in "
        "twenty does."
    )


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
    """Describe a mean and its interval, and the difference from the baseline."""
    if row.value is None:
        return {"mean": "-", "interval": "", **_difference(None, better)}
    return {
        "mean": format_value(row.value.mean),
        "interval": _interval(row.value).strip(),
        **_difference(row.difference, better),
    }


def _difference(change: Estimate | None, better: str) -> dict[str, str]:
    """Describe a difference with its sign; its verdict, if the interval excludes zero; in words."""
    if change is None:
        return {"change": "", "verdict": "", "words": ""}
    verdict, words = "", "no clear difference"
    low, high = change.low, change.high
    if change.prompts >= MIN_PROMPTS and low is not None and high is not None and low * high > 0:
        if better:
            verdict = "better" if (low > 0) == (better == "higher") else "worse"
        else:
            verdict = "higher" if low > 0 else "lower"
        ends = sorted(map(abs, (low, high)))
        least, mean, most = map(_two_digits, (ends[0], abs(change.mean), ends[1]))
        words = f"{verdict} by {mean} ({least} to {most})"
    signed = f"{change.mean:+.2g}{_interval(change, '+.2g')}"
    return {"change": signed, "verdict": verdict, "words": words}


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _interval(estimate: Estimate, form: str = ".3g") -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({estimate.low:{form}} to {estimate.high:{form}})"


def _sheet(
    folder: Path, comparison: Comparison, number: int, urls: Mapping[tuple[int, str], str]
) -> dict[str, Any]:
    """Collect the videos of a prompt: a strip of frames per policy."""
    strips = []
    for pair in comparison.pairs:
        if pair.number == number:
            frames = pair.evaluation.frames
            samples = sample_frames(folder / pair.video, frames, SAMPLES, SAMPLE_WIDTH)
            pictures = [picture_url(picture, "jpeg") for _, picture in samples]
            url = urls[number, pair.policy]
            strips.append({"name": pair.policy, "url": url, "pictures": pictures})
    return {"title": _title(comparison, number), "strips": strips}


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
        colors = {PLAN_COLORS[0]: "var(--mid)", PLAN_COLORS[-1]: "var(--line)"}  # not on dark pages
        return svg(plan_figure(plans, comparison.config), colors)
