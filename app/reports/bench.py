"""A benchmark as text, to be pasted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from packforcing.app.reports.tables import make_table
from packforcing.runtime.bench import Benchmark, Spread
from packforcing.units import format_memory

if TYPE_CHECKING:
    from rich.console import RenderableType


def bench_tables(result: Benchmark) -> Iterator[RenderableType]:
    """Lay out what was measured, and what was not."""
    width, height = result.size
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    yield (
        f"{result.model} at {width}x{height}, {result.steps} steps, {result.precision}; "
        f"{result.policy}"
    )
    yield f"{result.runs_on}; {result.machine}"
    yield versions
    yield ""
    counted = f"{result.blocks} blocks after {result.warm_up}"
    head = (f"milliseconds ({counted})", "times", "quartile", "median", "quartile", "GFLOP/s")
    rows = [
        (name, f"{call.times:g}", *_cells(call.milliseconds), f"{call.rate / 1e9:,.0f}")
        for name, call in result.calls.items()
    ]
    rows += [
        ("between the calls", "1", *_cells(result.outside), ""),
        ("a block", "1", *_cells(result.making), ""),
        ("encoding it as H.264", "1", *_cells(result.encoding), ""),
    ]
    yield make_table(rows, head, "lr")
    yield ""
    yield make_table(_facts(result))
    yield ""
    yield f"not measured: {'; '.join(result.not_measured)}"


def _cells(spread: Spread) -> tuple[str, str, str]:
    return f"{spread.low:.1f}", f"{spread.median:.1f}", f"{spread.high:.1f}"


def _facts(result: Benchmark) -> Iterator[tuple[str, str]]:
    fps = result.fps
    yield (
        "frames per second, made and encoded",
        f"{fps.median:.1f} ({fps.low:.1f} to {fps.high:.1f}), "
        f"{result.real_time:.2f} times real time",
    )
    first, load = result.first_frame_seconds, result.load_seconds
    yield "first frame", f"{first:.2f} s, after {load:.2f} s of loading"
    for memory in result.memory:
        plan = "" if memory.planned is None else f"; by plan {format_memory(memory.planned)}"
        yield memory.kind, f"{format_memory(memory.peak)}{plan}"
    if result.roof:
        roof = result.roof
        share = f"{roof.share:.0%} of the time inside the calls"
        yield "roofline", f"at least {roof.milliseconds:.1f} ms a block, {share}"
        yield "", roof.source
