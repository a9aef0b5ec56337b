"""Tables on a pipe are plain, aligned and never wrapped; on a terminal NO_COLOR is honored."""

import io
import sys

import pytest

from packforcing.app.cli.output import print_tables
from packforcing.app.reports.tables import make_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_cells_are_aligned_and_lines_end_without_spaces(capsys):
    rows = [("denoiser", "3.2 MB"), ("prompt", "456.5 kB")]
    print_tables("files:", make_table(rows, ("graph", "size"), "lr", indent=2))
    assert capsys.readouterr().out.splitlines() == [
        "files:",
        "  graph         size",
        "  denoiser    3.2 MB",
        "  prompt    456.5 kB",
    ]


def test_a_long_row_stays_one_line_in_a_pipe(capsys):
    print_tables("x" * 300, make_table([("name", "word " * 100 + "end")]))
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [300, 509]


def test_markup_in_a_cell_is_text(capsys):
    print_tables("[bold]", make_table([("[red]a[/red]", ":smile:")]))
    assert capsys.readouterr().out.splitlines() == ["[bold]", "[red]a[/red]  :smile:"]


@pytest.mark.parametrize("no_color", [False, True])
def test_a_head_is_bold_on_a_terminal_and_never_colored(monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    print_tables(make_table([("a", "b")], ("one", "two")))
    assert "\x1b[1m" in terminal.getvalue()
    assert "\x1b[3" not in terminal.getvalue()
