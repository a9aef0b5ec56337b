"""Read the figures of sizes, plans and the full model: see `benchmarks.figure_values`."""

from __future__ import annotations

import ast
import json
import re

from benchmarks.figure_values import Results, megabytes, table
from packforcing.runtime.engine_records import read_records
from packforcing.runtime.realtime import EFFICIENCY

PLAN = (
    "packforcing plan --model wan-1.3b --budget 4,6,8,12 --target sm86,sm89,sm120 "
    "--picture docs/plan.png"
)
FRAME_RATES = [
    f'packforcing plan --gpu "{name}" --fps 16'
    for name in (
        "RTX 4060", "RTX 3060", "RTX 4070 Laptop", "RTX 4090", "RTX 5060 Ti",
    )
] + ['packforcing plan --gpu "RTX 4090" --fps 16 --unmeasured']  # fmt: skip
BOUNDS = {
    f"{name.split()[-1]}-{form}": f'packforcing plan --gpu "{name}" --vae taehv {dtypes}'
    for name, quantized in (
        ("RTX 3060", "--weight-dtype w8a8"),
        ("RTX 4090", "--weight-dtype fp8 --attention-dtype fp8"),
        ("RTX 5090", "--weight-dtype nvfp4 --attention-dtype fp8"),
    )
    for form, dtypes in (("fp16", "--weight-dtype fp16"), ("quantized", quantized))
}
EDGE = ("Orin Nano 8GB", "AGX Orin 64GB", "Thor")
EDGE_PLANS = [f'packforcing plan --gpu "{name}" --vae taehv' for name in EDGE]
EDGE_RATES = [f'packforcing plan --gpu "{name}" --fps 16 --unmeasured' for name in EDGE]
SELF_FORCING = 'packforcing plan --model self-forcing --policy packforcing --gpu "RTX 4060"'


def size_values(results: Results) -> dict[str, str]:
    sizes = json.loads(results.text())
    return {
        "two-minutes": f"{sizes['two_minutes'] / 1e9:.0f} GB",
        "checkpoint": f"{sizes['checkpoint'] / 1e9:.2f} GB",
        "archive": megabytes(sizes["archive"]),
    }


def plan_values(results: Results) -> dict[str, str]:
    text = results.text().strip()
    totals = {
        budget: total
        for budget, total in re.findall(r"^ *([\d.]+)  sm86 .*?([\d.]+)  \w+  ", text, re.MULTILINE)
    }
    return {
        "budgets": f"```\n$ {PLAN}\n{text}\n```",
        "smallest": f"{totals['4.00']} GiB",
    }


def frame_rate_values(results: Results) -> dict[str, str]:
    listings = [
        f"$ {command}\n{results.text(number).strip()}" for number, command in enumerate(FRAME_RATES)
    ]
    first, *others = (text.partition("\nIt is made by")[0].strip() for text in listings)
    tables = "\n\n".join([first, *(text.partition("\n\nLeft out")[0] for text in others)])
    commands = listings[0].partition("It is made by\n\n")[2].strip().replace("\n  ", "\n")
    return {"plans": f"```\n{tables}\n```", "commands": f"```\n{commands}\n```"}


def edge_values(results: Results) -> dict[str, str]:
    rows, listings = [], []
    for number, name in enumerate(EDGE):
        text = results.text(number)
        (config,) = re.findall(r" on sm\d+: (.*), the tiny autoencoder$", text, re.MULTILINE)
        pool = text.partition("memory of both")[2]
        total, budget = (
            re.findall(rf"^{row} +[\d,]+ +([\d.]+)", pool, re.MULTILINE)[0]
            for row in ("total", "budget")
        )
        (bound,) = re.findall(r"\(sm\d+\) +at least ([\d.]+)", text)[:1]
        build = re.findall(r"^denoiser +[\d,]+ +([\d.]+)", text, re.MULTILINE)[0]
        seconds = f"{float(bound) / EFFICIENCY:.3g}"
        rows.append([name, config, f"{total} of {budget} GiB", f"{build} GiB", seconds])
        rates = results.text(len(EDGE) + number).partition("\nIt is made by")[0].strip()
        listings.append(f"$ {EDGE_RATES[number]}\n{rates}")
    heads = ["", "history and precision", "memory", "to build the denoiser", "seconds"]
    return {"table": table(heads, rows), "rates": "```\n" + "\n\n".join(listings) + "\n```"}


def bound_values(results: Results) -> dict[str, str]:
    return {
        name: re.findall(r"at most ([\d.]+) fps", results.text(number))[0]
        for number, name in enumerate(BOUNDS)
    }


def self_forcing_values(results: Results) -> dict[str, str]:
    listing = "\n\n".join(results.text().strip().split("\n\n")[:2])  # all of the device's memory
    (history,) = re.findall(r"^ *total +[\d,]+ +([\d.]+)", results.text(1), re.MULTILINE)[:1]
    return {
        "plan": f"```\n$ {SELF_FORCING}\n{listing}\n```",
        "history": f"{history} GiB",
    }


def full_size_values(results: Results) -> dict[str, str]:
    export, build, verify = (results.cost(number) for number in (0, 1, 2))
    bundle = results.folder / "wan"
    files = sum(path.stat().st_size for path in bundle.glob("*") if path.is_file())
    records = read_records(bundle, "tensorrt-rtx")
    engine = records["denoiser"]
    (outputs,) = re.findall(r"(\d[\d,]*) outputs", results.text(2))[:1]
    return {
        "export": f"{export['seconds']:.0f} s, {export['peak_bytes'] / 1e9:.2f} GB of memory, "
        f"{files / 1e9:.1f} GB of files",
        "build": f"{build['seconds']:.0f} s, {build['peak_bytes'] / 1e9:.1f} GB of memory",
        "engine": f"{engine.file.bytes / 1e9:.1f} GB",
        "scratch": megabytes(max(engine.scratch.values())),
        "outputs": outputs,
        "verify": f"{verify['seconds']:.0f} s, {verify['peak_bytes'] / 1e9:.1f} GB of memory",
    }


BUILT = {
    "fp16": "fp16", "int8": "int8", "int4": "int4", "fp8": "fp8 (sm89 and sm120)",
    "cache int8": "fp16, int8 cache", "int8, cache int8": "int8, int8 cache",
    "int4, cache int8": "int4, int8 cache",
    "fp8, cache fp8": "fp8, fp8 cache (sm89 and sm120)",
}  # fmt: skip


def builder_values(results: Results) -> dict[str, str]:
    text = results.text()
    start = text.index("30 layers: bytes per")
    ratios, scratch, weights = (
        ast.literal_eval(part) for part in re.findall(r"\{[^}]*\}", text[start:])[:3]
    )
    rows = [
        [
            title,
            f"{weights[kind] / 1e6:,.1f} MB" if "cache" not in kind else "",
            f"{ratios[kind]:.3f}" if kind in ratios else "",
            megabytes(scratch[kind]),
        ]
        for kind, title in BUILT.items()
    ]
    return {"table": table(["", "weights", "bytes per quantized weight", "scratch"], rows)}
