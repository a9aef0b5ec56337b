"""A page about a comparison of policies or bundles, and the same for a terminal.

One HTML file that loads nothing from elsewhere; the videos lie beside it.
"""

from __future__ import annotations

import html
import io
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from packforcing.app.reports.demo import (
    READ_KEY,
    STYLE,
    embedded,
    read_map,
    rows,
    sample_frames,
    save_page,
    versions,
)
from packforcing.app.reports.plan import draw
from packforcing.app.reports.tables import make_table
from packforcing.calibration.recipes import Loss
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType

SHEETS, SAMPLES = 8, 10  # prompts, pictures of each video
SAMPLE_WIDTH, GAP = 160, 4  # pixels
COLUMNS = 3  # of curves
FEWEST = 6  # prompts from which on an interval is believed: all differences agree in 3% by chance
WORST = 12  # matrices of a quantised bundle


def write_report(folder: Path, found: Comparison) -> Path:
    """Writes compare.html, whole or not at all, and returns its path; raises `OutputError`."""
    page = folder / "compare.html"
    save_page(page, _page(folder, found))
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
            (
                bundle,
                *(
                    f"{kind} {_decibels(min(r, default=None))}"
                    for kind, r in _kinds(losses).items()
                ),
            )
            for bundle, losses in comparison.outputs.items()
        )


def _mean(row: Row) -> str:
    return format_value(None if row.value is None else row.value.mean)


def _kinds(losses: Mapping[str, Loss]) -> dict[str, list[float]]:
    """Outputs of all layers together: signal-to-noise ratios of those that have an error."""
    kinds: dict[str, list[float]] = {}
    for output, loss in losses.items():
        ratios = kinds.setdefault(output.partition(".")[0], [])
        if loss.snr is not None:
            ratios.append(loss.snr)
    return kinds


def _decibels(ratio: float | None) -> str:
    return "equal" if ratio is None else f"{ratio:.1f} dB"


def _fidelity(found: Comparison) -> dict[str, tuple[str, ...]]:
    """PSNR, SSIM and GMSD of each bundle: mean with its interval, and the worst of a prompt."""
    cells: dict[str, tuple[str, ...]] = {}
    for name, given in found.fidelity.items():
        parts = []
        for head, unit, values, worst in (
            ("PSNR", " dB", [one.psnr for one in given if one.psnr is not None], min),
            ("SSIM", "", [one.ssim for one in given], min),
            ("GMSD", "", [one.gmsd for one in given], max),
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
        "bundle": _mb(cost.bundle),
        "tokens read": f"{cost.tokens_read:,}",
        "ms a block": f"{cost.block_seconds * 1e3:.0f}",
        "ms at the end": f"{cost.last_block_seconds * 1e3:.0f}",
        "host buffers": _mb(cost.buffers),
        "archive": _mb(cost.archive),
        "host peak": _mb(cost.host_peak),
        f"card, planned for {TARGET}": _mb(cost.device),
    }


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _page(folder: Path, found: Comparison) -> str:
    config, first = found.config, next(iter(found.costs))
    prompts = {pair.number: pair.prompt for pair in found.pairs}
    facts = {
        "Model": f"{config.name}, {config.width}x{config.height}, {config.fps} frames/s",
        "Videos": f"{len(prompts)} prompts of {found.seconds:g} s, each under "
        f"{len(found.costs)} {'bundles' if found.fidelity else 'policies'} with the same seed",
        "Intervals": "95% of the means of 10,000 resamples of the prompts; differences are taken "
        f"prompt by prompt, from {first}"
        + (f". Under {FEWEST} prompts they say little" if len(prompts) < FEWEST else ""),
    }
    costs = {name: _costs(cost) for name, cost in found.costs.items()}
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in costs[first])
    return _PAGE.format(
        style=STYLE + _MORE_STYLE,
        model=html.escape(config.name),
        facts=rows({name: (text,) for name, text in facts.items()}),
        first=html.escape(first),
        fewest=FEWEST,
        end=f"{min(END, found.seconds):g}",
        end_table=_summary(found.end),
        whole_table=_summary(found.whole),
        quantised=_quantised(found),
        cost_heads=heads,
        costs=rows({name: tuple(cells.values()) for name, cells in costs.items()}),
        curves=_curves(found),
        segment=f"{SEGMENT:g}",
        sheets="".join(_sheet(folder, found, number) for number in sorted(prompts)[:SHEETS]),
        read_key=READ_KEY,
        reads="".join(_reads(found)),
        plan=_plan(found),
        meanings=rows({
            measure.head: (measure.title, measure.better, measure.meaning)
            for measure in ALL_MEASURES.values()
        }),
        versions=rows({"Made with": (versions(),), "Bundle": (found.bundle,)}),
    )  # fmt: skip


def _quantised(found: Comparison) -> str:
    """How near videos of the bundles are to the first's, and which matrices lost most."""
    if not found.fidelity:
        return ""
    first = next(iter(found.costs))
    prompts = {pair.number: pair.prompt for pair in found.pairs if pair.policy == first}
    each = {
        f"{number}: {prompt}": tuple(
            f"{_decibels(one.psnr)}, {one.ssim:.4f}, {one.gmsd:.4f}"
            for one in (given[number] for given in found.fidelity.values())
        )
        for number, prompt in prompts.items()
    }
    names = "".join(f"<th>{html.escape(name)}</th>" for name in found.fidelity)
    worst = "".join(
        f"<h3>{html.escape(name)}</h3><table>"
        + rows({
            matrix: (_decibels(ratio),)
            for matrix, ratio in list(ratios.items())[:WORST]
        })
        + "</table>"
        for name, ratios in found.snr.items()
    )  # fmt: skip
    outputs = {
        output: tuple(
            f"{_decibels(losses[output].snr)}, {losses[output].error:.2g}"
            for losses in found.outputs.values()
        )
        for losses in found.outputs.values()
        for output in losses
    }
    return _QUANTISED.format(
        close=f"{CLOSE:g}",
        first=html.escape(first),
        means=rows(_fidelity(found)),
        names=names,
        each=rows(each),
        outputs=rows(outputs),
        unmeasured=html.escape(f"Not measured: {found.unmeasured}" if found.unmeasured else ""),
        plot=_loss_plot(found),
        worst=worst or "<p>No weights are quantised.</p>",
        count=WORST,
    )


def _summary(summary: Summary) -> str:
    """A table: a row per measure, a column per policy."""
    lines = ["<tr><th></th>" + "".join(f"<th>{html.escape(p)}</th>" for p in summary) + "</tr>"]
    for name, measure in ALL_MEASURES.items():
        if not any(name in measures for measures in summary.values()):
            continue
        cells = "".join(_cell(measures[name], measure.better) for measures in summary.values())
        mark = {"higher": " &uarr;", "lower": " &darr;"}.get(measure.better, "")
        lines.append(f"<tr><th>{measure.title}{mark}</th>{cells}</tr>")
    return "".join(lines)


def _cell(row: Row, better: str) -> str:
    """A mean with its interval, and whether it is better or worse than the first policy's."""
    if row.value is None:
        return "<td>-</td>"
    verdict, change = "", row.difference
    if better and change and change.prompts >= FEWEST:
        assert change.low is not None and change.high is not None
        if change.low > 0 or change.high < 0:
            verdict = "better" if (change.low > 0) == (better == "higher") else "worse"
    text = f"{format_value(row.value.mean)}<small>{_interval(row.value)}</small>"
    if change:
        text += f"<small>{change.mean:+.2g}{_interval(change, '+.2g')}</small>"
    return f'<td class="{verdict}">{text}</td>'


def _interval(estimate: Estimate, form: str = ".3g") -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({estimate.low:{form}} to {estimate.high:{form}})"


def _curves(found: Comparison) -> str:
    """Every measure over the length of the video, a line per policy, as SVG."""
    from matplotlib.figure import Figure

    names = [
        name
        for name in ALL_MEASURES
        if any(
            segment.values.get(name) is not None
            for pair in found.pairs
            for segment in pair.evaluation.segments
        )
    ]
    lines = -(-(len(names) + 2) // COLUMNS)
    with _style():
        figure = Figure(figsize=(11, 1.9 * lines + 0.5), layout="constrained")
        axes = np.ravel(figure.subplots(lines, COLUMNS))
        for axis, name in zip(axes, names):
            _curve(axis, found, name)
        block = found.config.block_pixel_frames / found.config.fps
        for axis, title, values in (
            (axes[len(names)], "ms per block", "block_seconds"),
            (axes[len(names) + 1], "context tokens read per block", "tokens_read"),
        ):
            scale = 1e3 if values == "block_seconds" else 1
            for policy in found.costs:
                given = [getattr(p, values) for p in found.pairs if p.policy == policy]
                mean = _per_segment(np.mean(given, 0) * scale, block)
                axis.plot(*mean, lw=1.4, label=policy)
            axis.set_title(title, loc="left")
            axis.set_ylim(bottom=0)
        for axis in axes[len(names) + 2 :]:
            axis.axis("off")
        for axis in axes:
            axis.set_xlim(0, found.seconds)
            axis.spines[["top", "right"]].set_visible(False)
        handles, labels = axes[len(names)].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
        return _svg(figure)


def _loss_plot(found: Comparison) -> str:
    """Signal-to-noise ratio of every quantised matrix and of every output, by layer, as SVG."""
    from matplotlib.figure import Figure

    outputs = {
        bundle: {name: loss.snr for name, loss in losses.items()}
        for bundle, losses in found.outputs.items()
    }
    with _style():
        figure = Figure(figsize=(11, 3), layout="constrained")
        parts = ("dB of each quantised matrix", found.snr), ("dB of each key and value", outputs)
        for axis, (title, ratios) in zip(figure.subplots(1, 2), parts):
            for bundle in found.fidelity:
                points = _by_layer(ratios.get(bundle, {}))
                axis.plot(*points, ls="", marker="o", ms=4, alpha=0.6, label=bundle)
            axis.set_title(title, loc="left")
            axis.set_xlabel("layer")
            axis.set_xlim(-0.5, found.config.layers - 0.5)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_visible(any(line.get_xdata().size for line in axis.lines))
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
        return _svg(figure)


def _by_layer(ratios: Mapping[str, float | None]) -> tuple[list[int], list[float]]:
    """Layers and ratios of what has a layer in its name and an error at all."""
    found = [
        (int(layer.group(1)), ratio)
        for name, ratio in ratios.items()
        if ratio is not None and (layer := re.search(r"\.(\d+)(?:\.|$)", name))
    ]
    return [layer for layer, _ in found], [ratio for _, ratio in found]


def _style() -> AbstractContextManager[None]:
    """Of plots: text stays text, and the same plot is the same SVG."""
    from matplotlib import rc_context

    return rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "packforcing"})


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _curve(axis: Axes, found: Comparison, name: str) -> None:
    """A measure's mean over prompts, segment by segment."""
    for policy in found.costs:
        segments = [pair.evaluation.segments for pair in found.pairs if pair.policy == policy]
        times, means = [], []
        for column in zip(*segments):
            values = [v for segment in column if (v := segment.values[name]) is not None]
            if values:
                times.append((column[0].start + column[0].stop) / 2)
                means.append(np.mean(values))
        axis.plot(times, means, lw=1.4, marker=".", ms=4)
    axis.set_title(ALL_MEASURES[name].title, loc="left")


def _per_segment(values: np.ndarray, block: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and medians of values per block, ten seconds at a time."""
    size = max(1, round(SEGMENT / block / 5))
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    times = [(i * size + len(part) / 2) * block for i, part in enumerate(parts)]
    return np.array(times), np.array([np.median(part) for part in parts])


def _sheet(folder: Path, found: Comparison, number: int) -> str:
    """A prompt's videos, a strip of pictures under each policy."""
    pairs = [pair for pair in found.pairs if pair.number == number]
    strips = []
    for pair in pairs:
        frames = pair.evaluation.frames
        pictures = [
            np.pad(picture, ((0, 0), (0, GAP), (0, 0)), constant_values=255)
            for _, picture in sample_frames(folder / pair.video, frames, SAMPLES, SAMPLE_WIDTH)
        ]
        address = embedded(np.concatenate(pictures, 1), ".jpg")
        strips.append(
            f'<figure><figcaption><a href="{html.escape(pair.video)}">'
            f'{html.escape(pair.policy)}</a></figcaption><img src="{address}" '
            f'alt="{html.escape(pair.policy)}"></figure>'
        )
    title = f"{pairs[0].prompt} (seed {pairs[0].seed})"
    return f"<h3>{html.escape(title)}</h3>{''.join(strips)}"


def _reads(found: Comparison) -> Iterator[str]:
    """What each policy with an archive read, in the video of the first prompt."""
    for name, cost in found.costs.items():
        pair = next(pair for pair in found.pairs if pair.policy == name)
        if cost.policy.mid:
            yield (
                f"<figure><figcaption>{html.escape(name)}: {_history(cost.policy)}</figcaption>"
                f"{read_map(pair.read, cost.policy)}</figure>"
            )


def _history(policy: Policy) -> str:
    return f"{policy.sink} sink, {policy.mid} mid, {policy.recent} recent, {policy.selection}"


def _plan(found: Comparison) -> str:
    """The picture of what the policies take on a card."""
    import cv2

    each = {
        (policy.sink, policy.mid, policy.recent, str(cost.precision)): cost
        for cost in found.costs.values()
        for policy in [cost.policy]
    }
    plans: list[Any] = []
    for cost in each.values():
        config = msgspec.structs.replace(found.config, precision=cost.precision)
        config = config_for_video(config, cost.policy, found.seconds)
        plans.append((None, TARGET, make_plan(config, TARGET, seconds=found.seconds)))
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "plan.png"
        draw(plans, found.config, picture)
        image = cv2.imread(str(picture))
    assert image is not None
    return f'<img src="{embedded(image, ".png")}" alt="memory on a card">'


_MORE_STYLE = """
body { max-width: 72rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; font-weight: 600; }
.wide { overflow-x: auto; }
.results th:first-child { white-space: nowrap; }
.results th { width: auto; padding-right: 1rem; }
.results tr:first-child th { color: var(--ink); }
.results { width: auto; }
.results td { padding-right: 1rem; vertical-align: top; }
small { display: block; color: var(--faint); font-size: .75rem; white-space: nowrap; }
.better { background: #2a9d5a33; } .worse { background: #c2571a33; }
.curves svg, .plan img { background: #fff; border: 0; width: 100%; height: auto; }
.sheets img { border-radius: 0; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
"""

_QUANTISED = """<h2>How near the videos are to those of {first}</h2>
<p>The first {close} seconds, frames before they are encoded: PSNR of the mean squared error over
all of them; SSIM (Wang et al., 2004) and GMSD (Xue et al., 2014; 0 is equal) of luma, mean over
frames. A rollout amplifies any difference.</p>
<table>{means}</table>
<div class="wide"><table class="results"><tr><th></th>{names}</tr>{each}</table></div>
<h2>What each output of the denoiser lost</h2>
<p>Signal-to-noise ratio, and the error's RMS relative to the output's own, against the denoiser of
{first} on the same inputs: every call of a rollout of {first} up to its first full context, the
flow of the steps, all else of commits and mid passes. Both are computed in fp32. {unmeasured}</p>
<div class="wide"><table class="results"><tr><th></th>{names}</tr>{outputs}</table></div>
{plot}
<h2>What lost most when quantised</h2>
<p>Signal-to-noise ratio of each bundle's {count} worst matrices: of what they give, where the
bundle was quantised with statistics, else of their weights.</p>
{worst}"""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{model} compared - PackForcing</title>
<style>{style}</style>
<h1>How {model} holds, compared</h1>
<table>{facts}</table>
<h2>The last {end} seconds, by segments of ten</h2>
<p>Mean over prompts and its interval; below it the difference from {first}. With {fewest} prompts
or more, coloured where that difference's interval leaves zero out:
<span class="better">better</span>, <span class="worse">worse</span>. Arrows say which way is
better.</p>
<div class="wide"><table class="results">{end_table}</table></div>
{quantised}
<h2>What it takes</h2>
<p>Buffers are fixed from the first block on, the archive is as long as the video. The host's peak
is all of the process: libraries, graphs and what earlier videos left. Other jobs on the machine
show in the times.</p>
<div class="wide"><table class="results"><tr><th></th>{cost_heads}</tr>{costs}</table></div>
<h2>Over the length of the video</h2>
<p>Means over prompts, {segment} seconds at a time; time and tokens per block in steps of a fifth
of that. Across: seconds of video.</p>
<div class="curves">{curves}</div>
<h2>Pictures</h2>
<p>Spread over the video, first frame to last.</p>
<div class="sheets">{sheets}</div>
<h2>Which archived blocks were read when</h2>
<p>In the video of the first prompt. {read_key}</p>
<div class="maps">{reads}</div>
<h2>Memory on a card</h2>
<p>By plan, a bar for each different history.</p>
<div class="plan">{plan}</div>
<h2>The whole video</h2>
<div class="wide"><table class="results">{whole_table}</table></div>
<h2>What the measures are</h2>
<table>{meanings}</table>
<h2>Versions</h2>
<table>{versions}</table>
</html>
"""
