"""A pytest plugin, `-p tests.durations`: how long each file's tests took, and all of them."""

from __future__ import annotations

from collections import Counter


def pytest_terminal_summary(terminalreporter) -> None:
    """Print seconds by file, longest first, and the total."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration") and hasattr(report, "nodeid"):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("durations by file")
    for file, duration in seconds.most_common():
        terminalreporter.write_line(f"{duration:9.1f} s  {file}")
    terminalreporter.write_line(f"{seconds.total():9.1f} s  in all")
