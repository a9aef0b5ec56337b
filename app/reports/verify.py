"""The page, the JSON and the summary of a verification."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from packforcing.app.reports.page import save_page
from packforcing.files import write_file

if TYPE_CHECKING:
    from packforcing.export.verify import OutputCheck, Verification

DECADES = (-4, 2)  # of the chart: errors as powers of ten of the tolerance


def write_reports(folder: Path, verification: Verification) -> Path:
    """Write verify.html and verify.json; return the path of the page.

    Raises:
        OutputError: A file cannot be written.
    """
    page = folder / "verify.html"
    low, high = DECADES
    write_file(folder / "verify.json", as_json(verification).encode())
    save_page(
        page,
        "verify.html.j2",
        model=verification.model,
        verdict=verdict(verification),
        about=_about(verification),
        low=low,
        high=high,
        graphs={graph: _marks(checks) for graph, checks in _by_graph(verification).items()},
        tolerances=", ".join(
            f"{name}: {limit.largest:.1e} and {limit.mean:.1e}"
            for name, limit in verification.limits.items()
        ),
        checks=verification.checks,
    )
    return page


def as_json(verification: Verification) -> str:
    """Encode a verification as JSON; NaN and infinity become null."""
    return msgspec.json.format(msgspec.json.encode(verification), indent=1).decode() + "\n"


def verdict(verification: Verification) -> str:
    """Return one line: how many outputs were compared, and how many missed."""
    count, missed = len(verification.checks), len(verification.missed)
    if missed:
        return f"{missed} of {count} outputs missed"
    return f"all {count} outputs verified"


def summary(verification: Verification) -> Iterator[str]:
    """Yield lines for a terminal: every miss, and the worst output of every graph."""
    for check in verification.missed:
        beyond = "" if check.independent else ", and reads beyond kv_len"
        yield f"missed: {_name(check)}: {_error(check)}{beyond}"
    for graph, checks in _by_graph(verification).items():
        worst = checks[0]
        yield f"{graph:<12} {len(checks):>4} outputs, worst: {_name(worst)}: {_error(worst)}"
    yield f"engines: {verification.engines}"
    yield f"{verification.model}: {verdict(verification)}"


def _name(check: OutputCheck) -> str:
    return f"{check.graph}, {check.run}, {check.call}, {check.output}"


def _error(check: OutputCheck) -> str:
    return (
        f"largest error {check.largest:.1e}, mean {check.mean:.1e}, "
        f"{check.share:.0%} of the tolerance"
    )


def _by_graph(verification: Verification) -> dict[str, list[OutputCheck]]:
    """Group checks by graph, the worst first."""
    groups: dict[str, list[OutputCheck]] = {}
    for check in verification.checks:
        groups.setdefault(check.graph, []).append(check)
    return groups


def _about(verification: Verification) -> dict[str, str]:
    precision = verification.precision
    tools = verification.tools.items()
    return {
        "Bundle": verification.bundle,
        "Model": f"{verification.model}: computes in {precision.compute}: {precision}",
        "Inputs": verification.inputs,
        "Oracle": "the same graph in fp32 on ONNX Runtime's CPU provider, not optimized, "
        "with a context that ends at kv_len",
        "Runs": "onnxruntime: the graph as the runtime loads it on the CPU; rounded: in fp32, "
        "with every fp16 result rounded to fp16; softmax: in fp32, with that of fp8 attention "
        "rounded as engines may round it; all with garbage beyond kv_len",
        "Engines": verification.engines,
        "Time": f"{verification.seconds:.0f} s",
        "Versions": ", ".join(f"{name} {version}" for name, version in tools),
    }


def _marks(checks: list[OutputCheck]) -> dict[str, str]:
    """Draw a mark per output at its error, on a logarithmic scale."""
    low, high = DECADES
    paths = {True: "", False: ""}
    for check in checks:
        share = min(max(check.share, 10.0**low), 10.0**high)
        paths[check.passed] += f"M{math.log10(share):.3f} .15v.7"
    return {"good": paths[True], "bad": paths[False]}
