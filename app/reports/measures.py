"""The measures of a video as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from packforcing.app.reports.tables import make_table
from packforcing.evaluation.measures import ALL_MEASURES, Evaluation, format_value

if TYPE_CHECKING:
    from rich.console import RenderableType


def measure_table(evaluation: Evaluation) -> Iterator[RenderableType]:
    """Lay out a row per segment, a column per measure, and the whole video."""
    length_seconds = evaluation.frames / evaluation.fps
    yield f"{evaluation.video}: {evaluation.width}x{evaluation.height}, {length_seconds:.1f} s"
    rows = [(f"{part.start:g}-{part.stop:g}", part.values) for part in evaluation.segments]
    if len(rows) > 1:
        rows.append(("all", evaluation.values))
    yield make_table(
        ((span, *map(format_value, values.values())) for span, values in rows),
        ("seconds", *(ALL_MEASURES[name].head for name in evaluation.values)),
        "r",
    )
