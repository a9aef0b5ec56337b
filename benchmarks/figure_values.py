"""Read the figures of README.md and docs/ from what the commands of a run left in its folder.

Values are text, as the documents show them, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.ablate_attention import GOOD, Cost
from benchmarks.ablate_cache import SCHEMES
from packforcing import model_config
from packforcing.evaluation.compare import Comparison
from packforcing.evaluation.intervals import Estimate, estimate_mean
from packforcing.evaluation.measures import ALL_MEASURES

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KEYS = {measure.title: name for name, measure in ALL_MEASURES.items()}  # of evaluations


class Results:
    """What the commands of a run left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def text(self, number: int = 0) -> str:
        """Return what a command printed."""
        return (self.folder / f"{number}.log").read_text(encoding="utf-8", errors="replace")

    def cost(self, number: int = 0) -> dict[str, float]:
        """Return a command's `seconds` and `peak_bytes` of memory."""
        return json.loads((self.folder / f"{number}.json").read_text())

    def json(self, name: str) -> Any:
        """Return the content of a JSON file."""
        return json.loads((self.folder / name).read_text())

    def comparison(self) -> Comparison:
        """Return the result of `packforcing compare --out {out}`."""
        return msgspec.json.decode((self.folder / "compare.json").read_bytes(), type=Comparison)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    lines.insert(1, "|---" * len(heads) + "|")
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def interval(estimate: Estimate | None, scale: float = 1, form: str = ".2f") -> str:
    """Return a mean and its interval, "0.42 (0.12 to 0.75)", turned round for a negative scale."""
    if estimate is None:
        return "-"
    mean = f"{scale * estimate.mean:{form}}"
    if estimate.low is None or estimate.high is None:
        return mean
    low, high = sorted((scale * estimate.low, scale * estimate.high))
    return f"{mean} ({low:{form.lstrip('+')}} to {high:{form.lstrip('+')}})"


def points(estimate: Estimate | None) -> str:
    """Return a difference of shares in percentage points, with its interval."""
    return re.sub(r"^[+-]0\.0 ", "0.0 ", interval(estimate, 100, "+.1f")).replace("(-0.0 ", "(0.0 ")


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


# Policies

POLICY_COLUMNS = {
    "subject": ("subject consistency", ".3f"), "backgr.": ("background consistency", ".3f"),
    "struct.": ("structure consistency", ".3f"), "drift": ("color drift", ".1f"),
    "flicker": ("flicker", ".2f"), "color": ("color", ".3f"), "shape": ("shape", ".3f"),
    "ground": ("ground", ".3f"), "speed": ("speed", ".1f"), "returns": ("returns", ".1f"),
    "loop closure": ("loop closure", ".3f"),
}  # fmt: skip
# By value: policy compared with packforcing, measure, sign and digits of the difference
POLICY_GAPS = {
    "window-loop": ("sliding-window", "loop closure", 1, 2),
    "window-background": ("sliding-window", "background consistency", -1, 2),
    "window-drift": ("sliding-window", "color drift", 1, 1),
    "sink-loop": ("sink-window", "loop closure", 1, 2),
    "sink-drift": ("sink-window", "color drift", 1, 1),
    "sink-background": ("sink-window", "background consistency", -1, 3),
    "likeness-loop": ("packforcing-likeness", "loop closure", -1, 2),
    "recency-loop": ("packforcing-recency", "loop closure", -1, 2),
    "random-loop": ("packforcing-random", "loop closure", -1, 2),
    "likeness-returns": ("packforcing-likeness", "returns", 1, 1),
    "likeness-structure": ("packforcing-likeness", "structure consistency", -1, 3),
    "recency-ground": ("packforcing-recency", "ground", -100, 1),
    "random-structure": ("packforcing-random", "structure consistency", -1, 3),
}
# Whose mean and interval stand apart in the text
APART = "window-drift", "sink-loop", "likeness-returns", "recency-ground", "quarter-returns"
SPAN_GAPS = {
    "quarter-background": ("packforcing-quarter-span", "background consistency", -1, 3),
    "quarter-drift": ("packforcing-quarter-span", "color drift", 1, 1),
    "quarter-flicker": ("packforcing-quarter-span", "flicker", 1, 2),
    "quarter-returns": ("packforcing-quarter-span", "returns", 1, 1),
    "half-structure": ("packforcing-half-span", "structure consistency", -1, 3),
}


def _gaps(result: Comparison, gaps: Mapping[str, tuple[str, str, int, int]]) -> dict[str, str]:
    texts = {}
    for name, (policy, measure, sign, digits) in gaps.items():
        text = interval(result.end[policy][KEYS[measure]].difference, sign, f".{digits}f")
        if name in APART:
            text, _, ends = text.partition(" (")
            texts[f"{name}-range"] = ends.rstrip(")")
        texts[name] = text
    return texts


def _mean(result: Comparison, policy: str, measure: str) -> float:
    value = result.end[policy][KEYS[measure]].value
    return float("nan") if value is None else value.mean


def _number(change: Estimate | None) -> str:
    """How many prompts a difference is of, in words."""
    count = change.prompts if change else 0
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def _policy_table(result: Comparison) -> str:
    columns = POLICY_COLUMNS.values()
    rows = [
        [policy, *(f"{_mean(result, policy, *column):{form}}" for *column, form in columns)]
        for policy in result.end
    ]
    return table(["", *POLICY_COLUMNS], rows).replace(" nan ", " - ")


def last_step_values(results: Results) -> dict[str, str]:
    result = results.comparison()
    gaps = {
        "speed": ("packforcing-last-step", "speed", 1, 1),
        "returns": ("packforcing-last-step", "returns", 1, 1),
        "drift": ("packforcing-last-step", "color drift", 1, 1),
    }
    return {"table": _policy_table(result), **_gaps(result, gaps)}


def policy_values(results: Results) -> dict[str, str]:
    result = results.comparison()
    own, window = (result.costs[name] for name in ("packforcing", "sliding-window"))
    peaks = sorted(cost.host_peak / 1e6 for cost in result.costs.values())
    compared = (
        result.end[name][KEYS["loop closure"]].difference
        for name in ("sliding-window", "sink-window")
    )
    window_tours, sink_tours = (_number(change) for change in compared)
    return {
        "table": _policy_table(result),
        "color": f"{_mean(result, 'packforcing', 'color'):.1%}",
        "shape": f"{_mean(result, 'packforcing', 'shape'):.0%}",
        "ground": f"{_mean(result, 'packforcing', 'ground'):.0%}",
        "speed": f"{_mean(result, 'packforcing', 'speed'):.1f}",
        "loop": f"{_mean(result, 'packforcing', 'loop closure'):.0%}",
        "window": f"{_mean(result, 'sliding-window', 'loop closure'):.0%}",
        "window-tours": window_tours,
        "sink-tours": sink_tours,
        **_gaps(result, POLICY_GAPS),
        "buffers": f"{megabytes(own.buffers)} and {own.tokens_read} tokens",
        "window-buffers": f"{megabytes(window.buffers)} and {window.tokens_read} tokens",
        "archive": megabytes(own.archive),
        "process": f"{peaks[0]:.0f} to {peaks[-1]:.0f} MB",
        "block": f"{own.last_block_seconds * 1e3:.0f} and {own.block_seconds * 1e3:.0f} ms",
        "window-block": f"{window.last_block_seconds * 1e3:.0f} and "
        f"{window.block_seconds * 1e3:.0f} ms",
    }


def span_values(results: Results) -> dict[str, str]:
    return _gaps(results.comparison(), SPAN_GAPS)


def ten_minutes_values(results: Results) -> dict[str, str]:
    result = results.comparison()
    times = [1e3 * np.median(part) for part in np.array_split(result.pairs[-1].block_seconds, 6)]
    *most, last = (f"{time:.0f}" for time in times)
    return {
        "shape": f"{_mean(result, 'packforcing', 'shape'):.3f}",
        "ground": f"{_mean(result, 'packforcing', 'ground'):.3f}",
        "speed": f"{_mean(result, 'packforcing', 'speed'):.1f}",
        "returns": f"{max(pair.evaluation.values['returns'] or 0 for pair in result.pairs):.0f}",
        "archive": megabytes(result.costs["packforcing"].archive),
        "blocks": f"{', '.join(most)} and {last} ms",
    }


def retrieval_values(results: Results) -> dict[str, str]:
    text = results.text()
    shares = dict(re.findall(r"(\w+): ([\d.]+) of the blocks", text))
    gains = dict(re.findall(r"(\w+ over \w+): (\S+ \(.*?\))", text))
    order = ("likeness", "affinity", "random", "recency")
    heads = ["all candidates alike" if name == "random" else name for name in order]
    return {
        "table": table(heads, [[shares[name] for name in order]]),
        "affinity": gains["affinity over random"],
        "likeness": gains["likeness over affinity"],
    }


def reference_values(results: Results) -> dict[str, str]:
    lines = re.findall(r"(\w+): runtime .*?mean=([\d.]+).*?reference .*?mean=([\d.]+)",
                       results.text())  # fmt: skip
    pairs = {name: (float(runtime), float(reference)) for name, runtime, reference in lines}

    def both(name: str, form: str) -> str:
        values = [f"{value:{form}}" for value in pairs[name]]
        return values[0] if values[0] == values[1] else " and ".join(values)

    return {
        "shape": both("shape", ".3f"),
        "ground": both("ground", ".3f"),
        "speed": both("speed", ".1f"),
        "loop": both(KEYS["loop closure"], ".4f"),
    }


# Quantization

QUANTIZED = {
    "fp16": "fp16 throughout", "cache8": "int8 cache", "int8": "int8 weights",
    "int8-cache8": "int8 weights and cache", "fp8": "fp8 weights",
    "fp8-cachefp8": "fp8 weights and cache", "int4": "int4 weights",
}  # fmt: skip


def quantized_values(results: Results) -> dict[str, str]:
    result = results.comparison()
    rows, psnr_means = [], {}
    for name, title in QUANTIZED.items():
        psnr = [one.psnr for one in result.fidelity[name] if one.psnr is not None]
        ssim = [one.ssim for one in result.fidelity[name]]
        flow = result.outputs.get(name, {}).get("flow")
        flow_db = "" if name == "fp16" or flow is None or flow.snr is None else f"{flow.snr:.1f}"
        rows.append([
            title, interval(estimate_mean(psnr), 1, ".1f"), f"{np.median(psnr):.1f}",
            f"{min(psnr):.1f}", f"{np.mean(ssim):.3f}", f"{min(ssim):.3f}", flow_db,
        ])  # fmt: skip
        psnr_means[name] = f"{np.mean(psnr):.1f} dB"
    heads = ["", "PSNR, dB: mean (interval)", "median", "lowest", "SSIM: mean", "lowest",
             "SQNR of the flow, dB"]  # fmt: skip
    words = [
        [title, *(points(result.whole[name][KEYS[kind]].difference) for kind in WORDS)]
        for name, title in QUANTIZED.items()
        if name != "fp16"
    ]
    return {
        "table": table(heads, rows),
        "words": table(["", "color", "shape", "ground"], words),
        **{name: psnr_means[name] for name in ("cache8", "int8", "fp8", "int4")},
    }


def product_values(results: Results) -> dict[str, str]:
    """Mean PSNR by bundle, of those with products in less than fp16."""
    fidelity = results.comparison().fidelity
    return {
        name: f"{np.mean([one.psnr for one in fidelity[name] if one.psnr is not None]):.1f} dB"
        for name in ("w8a8", "nvfp4")
    }


def attention_values(results: Results) -> dict[str, str]:
    rows = []
    for entry in results.json("attention.json"):
        cost = msgspec.convert(entry, Cost)
        row = [cost.rounded, cost.channels, cost.scales, cost.softmax, f"{cost.flow or 0:.1f}"]
        if cost.psnr:
            mean, lowest, share = cost.summary
            row += [f"{mean:.1f} ({lowest:.1f})", f"{share:.0%}"]
            row += [f"{cost.blocks[0]:.0f}, {cost.blocks[-1]:.0f}"]
        rows.append([*row, *[""] * (8 - len(row))])
    heads = ["rounded", "channels", "scales", "softmax", "SQNR of the flow, dB",
             "PSNR, dB: mean (lowest)", f"at least {GOOD} dB", "first, last block, dB"]  # fmt: skip
    return {"table": table(heads, rows)}


WORDS = ["color", "shape", "ground"]
CACHE_ROWS = {
    "color": "color", "shape": "shape", "ground": "ground", "dynamic degree": "dynamic degree",
    "structure consistency": "structure consistency", "loop closure": "loop closure error",
}  # fmt: skip


def cache_values(results: Results) -> dict[str, str]:
    result = results.comparison()
    exact, small = result.end
    rows = []
    for name, title in CACHE_ROWS.items():
        change = result.end[small][KEYS[name]].difference
        if name == "loop closure":
            title += f", {change.prompts if change else 0} prompts that return in both"
        means = [f"{100 * _mean(result, bundle, name):.1f}" for bundle in (exact, small)]
        rows.append([title, *means, points(change)])
    changes = {row[0]: row[-1].split(" ")[0] for row in rows}
    costs = [result.costs[bundle] for bundle in (small, exact)]
    return {
        "table": table(["percent", "fp16", "int8 cache", "difference (interval)"], rows),
        **{name: changes[name] for name in ("color", "shape", "ground")},
        "memory": f"{megabytes(costs[0].buffers)} of buffers and "
        f"{megabytes(costs[0].archive)} of archive",
        "fp16-memory": f"{costs[1].buffers / 1e6:.1f} and {megabytes(costs[1].archive)}",
    }


def layer_values(results: Results) -> dict[str, str]:
    costs = {cost["part"]: cost for cost in results.json("layers.json")}

    def short(value: float) -> str:
        return f"{value:.1e}".replace("e-0", "e-")

    def row(title: str, *names: str) -> list[str]:
        cells = []
        for kind in ("int8", "int4"):
            errors = sorted(costs[name]["errors"][kind] for name in names)
            cells.append(" to ".join(dict.fromkeys((short(errors[0]), short(errors[-1])))))
        return [title, str(costs[names[0]]["matrices"]), *cells]

    last = max(int(name.split(".")[1]) for name in costs if name.startswith("blocks."))
    rows = [
        row("time embedding", "time_embedding"),
        row("time projection", "time_projection"),
        row("layer 0", "blocks.0"),
        row(f"layers 1 to {last - 1}, each", *(f"blocks.{n}" for n in range(1, last))),
        row(f"layer {last}", f"blocks.{last}"),
        row("head", "head"),
    ]
    return {"table": table(["part", "matrices", "int8", "int4"], rows)}


def cache_choice_values(results: Results) -> dict[str, str]:
    costs = results.json("schemes.json")
    schemes, fits = [], []
    for number, cost in enumerate(costs):
        ratios = [f"{cost['db'][i]:.1f} ({cost['db'][i + 1]:.1f})" for i in (0, 2)]
        if number < len(SCHEMES):
            scheme = cost["scheme"]
            share = f"{scheme['share_k']}, {scheme['share_v']}"
            cells = [scheme["keys"], share, scheme["scale"], scheme["range"]]
            cells[-1] = "largest" if cells[-1] == "absmax" else cells[-1]
            if number == 0:  # that of `quantize`
                cells = [f"**{cell}**" for cell in cells]
            schemes.append([*cells, *ratios, f"{cost['psnr'][0]:.1f} ({cost['psnr'][1]:.1f})"])
        else:
            fits.append([str(cost["prompts"]), *ratios])
    heads = ["keys", "granularity (keys, values)", "scales", "range", "keys, dB", "values, dB",
             "PSNR, dB"]  # fmt: skip
    return {
        "table": table(heads, schemes),
        "prompts": table(["prompts", "keys, dB", "values, dB"], fits),
    }


def quantizer_values(results: Results) -> dict[str, str]:
    titles = {"ours": "`quantize`", "onnxruntime": "onnxruntime.quantization",
              "modelopt": "ModelOpt"}  # fmt: skip
    rows: dict[str, list[str]] = {}
    for error in results.json("tools.json"):
        row = rows.setdefault(error["tool"], [titles[error["tool"]]])
        row += [f"{error[name]:.2f}" for name in ("mean", "worst")]
    heads = ["", "int8: mean", "int8: worst", "int4: mean", "int4: worst"]
    return {"table": table(heads, list(rows.values()))}


FILTER_COLUMNS = {
    "PSNR, dB": ("psnr", ".1f"), "SSIM": ("ssim", ".3f"), "GMSD": ("gmsd", ".3f"),
    "color": ("color", ".3f"), "shape": ("shape", ".3f"), "ground": ("ground", ".3f"),
    "smoothness": ("smoothness", ".4f"), "flicker": ("flicker", ".2f"),
}  # fmt: skip


def filter_values(results: Results) -> dict[str, str]:
    def cell(row: dict[str, float], key: str, form: str) -> str:
        return f"{row[key]:{form}}" if key in row else ""

    rows = [
        [way, *(cell(row, *column) for column in FILTER_COLUMNS.values())]
        for way, row in results.json("filters.json").items()
    ]
    return {"table": table(["", *FILTER_COLUMNS], rows)}


# Time and memory of the demo model


def bench_values(results: Results) -> dict[str, str]:
    blocks = results.json("bench.json")["blocks"]
    block = blocks["milliseconds"]["runtime"]
    config = model_config("demo")
    return {
        "block": f"{block:.0f} ms",
        "real-time": f"{1e3 * config.block_pixel_frames / config.fps / block:.1f}",
        "eager": f"{blocks['over_runtime']['eager']:.1f}",
    }


def checkpoint_values(results: Results) -> dict[str, str]:
    costs = results.json("bench.json")["checkpoints"]
    return {
        "percent": f"{costs['percent_of_render_time']:.0f}%",
        "seconds": f"{sum(costs['seconds'].values()):.1f} of {costs['seconds_total']:.0f} s",
    }


def hour_values(results: Results) -> dict[str, str]:
    hour = json.loads(re.findall(r"^\{.*?^\}", results.text(), re.MULTILINE | re.DOTALL)[0])
    change = hour["resident_mb_beyond_archive_per_10_minutes"]
    return {
        "frames": f"{hour['frames']:,}",
        "archive": f"{hour['archive_mb']:.0f} MB",
        "change": f"{'shrank' if change < 0 else 'grew'} by {abs(change):.1f} MB",
        "early": f"{hour['ms_per_block_early']:.0f} ms",
        "late": f"{hour['ms_per_block_late']:.0f} ms",
        "position": f"{hour['largest_packed_position']:g}",
        "both": f"{hour['last_minute'][KEYS['color and shape']]:.0%}",
        "speed": f"{hour['last_minute']['speed']:.1f}%",
    }


def stream_values(results: Results) -> dict[str, str]:
    times = results.json("stream.json")
    block = times["block_ms"]
    return {
        "first-frame": f"{times['first_frame_ms'] / 1e3:.2f} s",
        "first-frame-longest": f"{times['first_frame_ms_longest'] / 1e3:.2f} s",
        "switch": f"{times['switch_ms'] / 1e3:.2f} s",
        "switch-longest": f"{times['switch_ms_longest'] / 1e3:.2f} s",
        "block": f"{block:.0f} ms",
        "encode": f"{times['encode_ms']:.1f} ms",
        "encode-share": f"{times['encode_ms'] / block:.1%}",
        "send": f"{times['send_ms_1']:.1f} ms",
        "send-share": f"{times['send_ms_1'] / block:.1%}",
        "send-more": f"{times['send_ms_10']:.1f} ms",
    }


def stop_values(results: Results) -> dict[str, str]:
    times = results.json("stop.json")
    return {
        "stops": f"{times['stops']:.0f}",
        "median": f"{times['ratio_median']:.2f}",
        "longest": f"{times['ratio_longest']:.2f}",
    }


def viewers_values(results: Results) -> dict[str, str]:
    load = json.loads(re.findall(r"^\{.*?^\}", results.text(), re.MULTILINE | re.DOTALL)[0])
    return {
        "ratio": f"{load['ratio']:.2f}",
        "watched": f"{load['ms_per_block_watched']:.0f} ms",
        "idle": f"{load['ms_per_block_idle']:.0f} ms",
        "memory": f"{load['resident_mb']:.0f} MB",
        "growth": f"{load['resident_mb_growth_in_second_half']:+.1f} MB",
    }
