"""Tables for a terminal, without boxes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.padding import Padding
from rich.table import Table

GAP = 2  # spaces between columns


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
