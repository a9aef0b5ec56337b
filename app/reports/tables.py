"""Tables for a terminal, without boxes, and rows about a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from packforcing.config import Config
from packforcing.presets import switch_history
from packforcing.sampler import describe_steps

if TYPE_CHECKING:
    from rich.console import RenderableType

GAP = 2  # spaces between columns
WIDE = 10_000  # columns where there is no terminal: a row stays one line


def make_table(
    rows: Iterable[Sequence[str]],
    head: Sequence[str] = (),
    justify: str = "",
    indent: int = 0,
) -> Padding:
    """Align rows in columns.

    Args:
        rows: Cells of each row.
        head: Titles of the columns; none: no line for titles.
        justify: A letter per column, "l" or "r"; the last one is for the others as well.
        indent: Spaces before every line.
    """
    cells = [list(row) for row in rows]
    count = max(map(len, [head, *cells]))
    letters = (justify or "l").ljust(count, (justify or "l")[-1])
    sides: dict[str, Literal["left", "right"]] = {"l": "left", "r": "right"}
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, GAP, 0, 0),
        show_header=bool(head),
        header_style="bold",
    )
    for number in range(count):
        title = head[number] if number < len(head) else ""
        table.add_column(title, justify=sides[letters[number]], overflow="fold")
    for row in cells:
        table.add_row(*row)
    return Padding(table, (0, 0, 0, indent), expand=False)


def model_rows(config: Config) -> dict[str, str]:
    """Describe a model in words, by title."""
    block_seconds = config.block_pixel_frames / config.fps
    precision = config.precision
    return {
        "model": f"{config.name}: {config.width}x{config.height} at {config.fps} frames/s, "
        f"blocks of {config.block_pixel_frames} frames ({block_seconds:g} s)",
        "network": f"{config.layers} layers of width {config.dim}, {config.heads} heads",
        "dtypes": f"weights {precision.weights}, KV cache {precision.cache}, "
        f"attention {precision.attention_products}, other arithmetic {precision.compute}",
        "denoising": describe_steps(config),
        "text": f"{config.text_encoder}, at most {config.text_len} words or pieces",
        "history": f"{config.policy}; a prompt switch: {switch_history(config)}",
    }


def render_lines(console: Console, renderables: Iterable[RenderableType]) -> list[str]:
    """Return lines and tables as a console shows them, without spaces at the ends of lines."""
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable, soft_wrap=isinstance(renderable, str))
    return [line.rstrip() for line in capture.get().splitlines()]


def plain_text(*renderables: RenderableType) -> str:
    """Return lines and tables without styles."""
    console = Console(width=WIDE, color_system=None, highlight=False, markup=False, emoji=False)
    return "\n".join(render_lines(console, renderables))
