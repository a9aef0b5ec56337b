"""A pytest plugin, `-p tests.full_run`: full tests that passed with the same code do not run again.

They take hours, and a run may be interrupted. What passed is in out/full.json, for the code, the
weights and the tests that it passed with. At the end there are the seconds of each file.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

RECORD = Path(__file__).parents[1] / "out" / "full.json"


class FullRun:
    """The plugin.

    Attributes:
        digest: Of the code.
        passed: Seconds of the full tests that passed with it, by name.
        earlier: The same, of earlier runs.
    """

    def __init__(self) -> None:
        self.digest, self.passed, self.earlier = "", dict[str, float](), dict[str, float]()

    def pytest_collection_modifyitems(self, config, items) -> None:
        from benchmarks.figures import ROOMS, code_digest  # what conftest.py sets comes first

        self.digest = code_digest(*ROOMS, "benchmarks", "examples", "tests").hexdigest()
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        if record.get("digest") == self.digest:
            self.passed = record["passed"]
        self.earlier = dict(self.passed)
        done = [item for item in items if item.nodeid in self.earlier]
        items[:] = [item for item in items if item.nodeid not in self.earlier]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" and report.passed and "full" in report.keywords:
            from packforcing.files import write_file

            self.passed[report.nodeid] = round(report.duration, 1)
            RECORD.parent.mkdir(exist_ok=True)
            record = {"digest": self.digest, "passed": self.passed}
            write_file(RECORD, json.dumps(record, indent=1).encode())

    def pytest_terminal_summary(self, terminalreporter) -> None:
        seconds: Counter[str] = Counter()
        for reports in terminalreporter.stats.values():
            for report in reports:
                if hasattr(report, "duration") and hasattr(report, "nodeid"):
                    seconds[report.nodeid.partition("::")[0]] += report.duration
        for name, duration in self.earlier.items():
            seconds[name.partition("::")[0]] += duration
        terminalreporter.section("durations by file")
        for file, duration in seconds.most_common():
            terminalreporter.write_line(f"{duration:9.1f} s  {file}")
        terminalreporter.write_line(
            f"{seconds.total():9.1f} s  in all, of which {sum(self.earlier.values()):.1f} s in "
            f"earlier runs: {len(self.earlier)} full tests that passed with this code"
        )


def pytest_configure(config) -> None:
    config.pluginmanager.register(FullRun(), "full run")
