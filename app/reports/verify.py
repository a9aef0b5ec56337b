"""A page about a verification: which outputs missed, and how far the others are from missing.

One HTML file that loads nothing from elsewhere, with the same in JSON beside it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from packforcing.app.reports.demo import STYLE, rows, save_page

if TYPE_CHECKING:
    from packforcing.export.verify import Check, Verification

DECADES = (-4, 2)  # of the picture: errors as powers of ten of what is allowed


def write_reports(folder: Path, found: Verification) -> Path:
    """Writes verify.html and verify.json, each whole or not at all; raises `OutputError`.

    Returns the page's path.
    """
    page = folder / "verify.html"
    save_page(folder / "verify.json", as_json(found))
    save_page(page, _page(found))
    return page


def as_json(found: Verification) -> str:
    """A verification as JSON text; what is no number, or infinite, is null."""
    return msgspec.json.format(msgspec.json.encode(found), indent=1).decode() + "\n"


def verdict(found: Verification) -> str:
    """One line: how many outputs were compared, and how many missed."""
    count, missed = len(found.checks), len(found.missed)
    if missed:
        return f"{missed} of {count} outputs missed"
    return f"all {count} outputs verified"


def summary(found: Verification) -> Iterator[str]:
    """What was found, for a terminal: every miss, and the worst output of every graph."""
    for check in found.checks:
        if not check.passed:
            beyond = "" if check.independent else ", and reads beyond kv_len"
            yield f"missed: {_label(check)}: {_off(check)}{beyond}"
    for name, checks in _by_graph(found).items():
        worst = checks[0]
        yield f"{name:<12} {len(checks):>4} outputs, worst: {_label(worst)}: {_off(worst)}"
    yield f"engines: {found.engines}"
    yield f"{found.model}: {verdict(found)}"


def _label(check: Check) -> str:
    return f"{check.graph}, {check.run}, {check.call}, {check.output}"


def _off(check: Check) -> str:
    return (
        f"off by {check.largest:.1e} at most and {check.mean:.1e} on average, "
        f"{check.share:.0%} of what is allowed"
    )


def _by_graph(found: Verification) -> dict[str, list[Check]]:
    """Checks of every graph, worst first in each, as in all."""
    names = dict.fromkeys(check.graph for check in found.checks)
    return {name: [check for check in found.checks if check.graph == name] for name in names}


def _page(found: Verification) -> str:
    precision = found.precision
    facts = {
        "Bundle": found.bundle,
        "Model": f"{found.model}: {precision.compute} computed, weights in {precision.weights}, "
        f"cache in {precision.cache}",
        "Inputs": found.inputs,
        "Oracle": "the same graph in fp32 on ONNX Runtime's CPU provider, nothing optimised, "
        "with a context that ends at kv_len",
        "Compared": "onnxruntime: the graph as the runtime loads it on the CPU; rounded: in fp32, "
        "with every result that is fp16 rounded to it; both with garbage beyond kv_len",
        "Engines": found.engines,
        "Time": f"{found.seconds:.0f} s",
        "Versions": ", ".join(f"{name} {version}" for name, version in found.tools.items()),
    }
    limits = ", ".join(
        f"{name}: {limit.largest:.1e} and {limit.mean:.1e}" for name, limit in found.limits.items()
    )
    return _PAGE.format(
        style=STYLE + _MORE_STYLE,
        model=html.escape(found.model),
        verdict=verdict(found),
        facts=rows({name: (text,) for name, text in facts.items()}),
        limits=limits,
        picture="".join(
            f"<tr><th>{name}</th><td>{_strip(checks)}</td></tr>"
            for name, checks in _by_graph(found).items()
        ),
        checks="".join(map(_row, found.checks)),
    )


def _strip(checks: list[Check]) -> str:
    """Every output's error as a share of what is allowed, on a scale of powers of ten."""
    low, high = DECADES
    marks = {True: "", False: ""}
    for check in checks:
        place = math.log10(min(max(check.share, 10.0**low), 10.0**high))
        marks[check.passed] += f"M{place:.3f} .15v.7"
    return (
        f'<svg viewBox="{low} 0 {high - low} 1" preserveAspectRatio="none" class="strip" '
        f'role="img" aria-label="errors"><path class="limit" d="M0 0V1"/>'
        f'<path class="good" d="{marks[True]}"/><path class="bad" d="{marks[False]}"/></svg>'
    )


def _row(check: Check) -> str:
    cells = (
        check.run,
        check.call,
        check.output,
        "x".join(map(str, check.shape)),
        f"{check.scale:.3g}",
        f"{check.largest:.1e}",
        f"{check.mean:.1e}",
        f"{check.share:.0%}",
        "" if check.independent else "read",
        "" if check.passed else "missed",
    )
    kind = "" if check.passed else ' class="bad"'
    return f"<tr{kind}><th>{check.graph}</th>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


_MORE_STYLE = """
.strip { width: 100%; height: 1.4rem; }
.strip path { vector-effect: non-scaling-stroke; stroke-width: 1.5; }
path.good { stroke: var(--mid); } path.bad { stroke: var(--sink); }
path.limit { stroke: var(--faint); stroke-dasharray: 3 2; }
.checks { font-size: .85rem; }
.checks th, .checks td { padding-right: 1rem; white-space: nowrap; }
.checks thead th { width: auto; border-bottom: 1px solid var(--line); }
.checks td:nth-child(n+5):nth-child(-n+9), .checks thead th:nth-child(n+5):nth-child(-n+9)
  { text-align: right; }
tr.bad th, tr.bad td { color: var(--sink); font-weight: 600; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{model}: {verdict} - PackForcing</title>
<style>{style}</style>
<h1>{model}: {verdict}</h1>
<p>Every output of every graph against the same graph in fp32, on recorded inputs.</p>
<table>{facts}</table>
<h2>How near each output is to missing</h2>
<p>A mark per output: its error as a share of what is allowed, a factor of ten per sixth of the
width. The dashed line is what is allowed.
<span class="key mid">verified</span><span class="key sink">missed</span></p>
<table>{picture}</table>
<h2>Every output, worst first</h2>
<p>Errors are relative to the output's own scale, the RMS of what the oracle gives. Allowed are, as
the largest and as the mean over an output: {limits}. Garbage beyond kv_len must not change a bit.
</p>
<table class="checks"><thead><tr><th>graph</th><th>run</th><th>call</th><th>output</th>
<th>shape</th><th>scale</th><th>largest</th><th>mean</th><th>of allowed</th><th>garbage</th>
<th></th></tr></thead>
{checks}</table>
</html>
"""
