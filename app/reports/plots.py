"""Plots as SVG that takes the page's text color, for light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from packforcing.evaluation.compare import Comparison
from packforcing.evaluation.measures import ALL_MEASURES, SEGMENT, format_value

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's text color
COLORS = tuple(f"#01020{digit:x}" for digit in range(4, 12))  # of lines; stand for the page's
LINES = {color: f"var(--line-{number})" for number, color in enumerate(COLORS)}
SIZE = (3.7, 2.0)  # inches


@contextmanager
def plot_style() -> Iterator[None]:
    """Make matplotlib write text as text, and the same plot as the same SVG."""
    from matplotlib import rc_context

    parameters: Any = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    parameters |= {"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": "packforcing"}
    with rc_context(parameters):
        yield


def svg(figure: Figure, colors: Mapping[str, str] = LINES) -> Markup:
    """Encode a figure for a page: transparent, its ink and these colors those of the page.

    Args:
        figure: The figure, drawn under `plot_style`.
        colors: CSS colors of the page by color of the figure.
    """
    from markupsafe import Markup

    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for color, css in colors.items():
        text = text.replace(color, css)
    return Markup(re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1))


def measure_plots(comparison: Comparison) -> tuple[list[dict[str, Any]], list[str]]:
    """Plot every measure, and the costs per block, over the video: a line per policy.

    Returns:
        A title and an SVG per plot; and what has the same value in all places of all videos, as
        "title value", instead of a plot of flat lines.
    """
    plots, constants = [], []
    for name, measure in ALL_MEASURES.items():
        lines = [_measure_line(comparison, policy, name) for policy in comparison.costs]
        values = {format_value(value) for _, means in lines for value in means}
        if len(values) > 1:
            plot = _line_plot(lines, comparison.seconds, marker=".")
            plots.append({"title": measure.title, "svg": plot})
        elif values:
            constants.append(f"{measure.title} {values.pop()}")
    block_seconds = comparison.config.block_pixel_frames / comparison.config.fps
    for title, field, scale in (
        ("ms per block", "block_seconds", 1e3),
        ("context tokens read per block", "tokens_read", 1),
    ):
        lines = []
        for policy in comparison.costs:
            blocks = [getattr(pair, field) for pair in comparison.pairs if pair.policy == policy]
            lines.append(_medians(np.mean(blocks, 0) * scale, block_seconds))
        plots.append({"title": title, "svg": _line_plot(lines, comparison.seconds, bottom=0.0)})
    return plots, constants


def _measure_line(
    comparison: Comparison, policy: str, name: str
) -> tuple[list[float], list[float]]:
    """Return the middles of segments and the mean of a measure over prompts."""
    segments = [pair.evaluation.segments for pair in comparison.pairs if pair.policy == policy]
    times, means = [], []
    for column in zip(*segments):
        values = [v for segment in column if (v := segment.values.get(name)) is not None]
        if values:
            times.append((column[0].start + column[0].stop) / 2)
            means.append(float(np.mean(values)))
    return times, means


def _medians(values: np.ndarray, block_seconds: float) -> tuple[list[float], list[float]]:
    """Return times and medians of values per block, in fifths of a segment."""
    size = max(1, round(SEGMENT / block_seconds / 5))
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    times = [(i * size + len(part) / 2) * block_seconds for i, part in enumerate(parts)]
    return times, [float(np.median(part)) for part in parts]


def _line_plot(
    lines: list[tuple[list[float], list[float]]],
    seconds: float,
    bottom: float | None = None,
    marker: str = "",
) -> Markup:
    with plot_style():
        figure, axes = _figure()
        for number, (times, values) in enumerate(lines):
            color = COLORS[number % len(COLORS)]
            axes.plot(times, values, lw=1.4, marker=marker, ms=4, color=color)
        axes.set_xlim(0, seconds)
        axes.set_ylim(bottom=bottom)
        return svg(figure)


def loss_plots(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Plot the SQNR of quantized matrices, and of keys and values, by layer."""
    outputs = {
        bundle: {name: loss.snr for name, loss in losses.items()}
        for bundle, losses in comparison.outputs.items()
    }
    for title, ratios in (
        ("dB of each quantized matrix, by layer", comparison.snr),
        ("dB of each key and value, by layer", outputs),
    ):
        points = [snr_by_layer(ratios.get(bundle, {})) for bundle in comparison.fidelity]
        if not any(layers for layers, _ in points):
            continue
        with plot_style():
            figure, axes = _figure()
            for number, (layers, values) in enumerate(points, 1):  # the baseline is the first color
                axes.plot(layers, values, ls="", marker="o", ms=4, alpha=0.6,
                          color=COLORS[number % len(COLORS)])  # fmt: skip
            axes.set_xlim(-0.5, comparison.config.layers - 0.5)
            yield {"title": title, "svg": svg(figure)}


def snr_by_layer(ratios: Mapping[str, float | None]) -> tuple[list[int], list[float]]:
    """Return layers and ratios of the names that have a layer, where there is an error at all."""
    points = [
        (int(layer.group(1)), ratio)
        for name, ratio in ratios.items()
        if ratio is not None and (layer := re.search(r"\.(\d+)(?:\.|$)", name))
    ]
    return [layer for layer, _ in points], [ratio for _, ratio in points]


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
