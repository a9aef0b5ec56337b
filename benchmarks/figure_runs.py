"""The runs behind the figures of README.md and docs/: commands, durations, and who reads them.

Durations are of 2 cores of an AMD EPYC.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks import figure_pictures as pictures
from benchmarks import figure_plans as plans
from benchmarks import figure_values as values

ROOT = Path(__file__).parents[1]
Command = tuple[str, ...]


class Run(NamedTuple):
    """Commands whose results hold figures.

    Attributes:
        commands: Arguments of Python; `{out}` is the run's folder, `{NAME}` that of one it needs.
        minutes: Expected duration.
        extract: Reads the values from the results, by name.
        needs: Runs whose folders the commands use.
        pictures: By path, what draws it from the run's folder.
    """

    commands: tuple[Command, ...]
    minutes: float
    extract: Callable[[values.Results], dict[str, str]]
    needs: tuple[str, ...] = ()
    pictures: Mapping[str, Callable[[Path, Path], None]] = {}


def packforcing(line: str) -> Command:
    """Return a command of the command line."""
    return ("-m", "packforcing.app.cli", *shlex.split(line))


def full_test(line: str) -> Command:
    """Return a test that prints figures."""
    return ("-m", "pytest", "-m", "full", "-s", *shlex.split(line))


def benchmark(line: str) -> Command:
    """Return a program of this folder."""
    name, *words = shlex.split(line)
    return ("-m", f"benchmarks.{name}", *words)


DRAW_PROMPTS = (
    "import sys; from packforcing import model_config; "
    "from packforcing.evaluation.prompt_sets import draw_prompts; "
    "prompts = draw_prompts(model_config('demo'), 32, 1000); "
    "open(sys.argv[1], 'w').write('\\n'.join(prompt.text for prompt in prompts))"
)
DRAW_TWELVE = DRAW_PROMPTS.replace("in prompts)", "in prompts[:12])")
SIZES = (
    "import json; from packforcing import model_config; c = model_config('wan-1.3b'); "
    "token = 2 * c.layers * c.dim * 2; "  # bytes of its keys and values in fp16
    "blocks = c.frames(120) // c.block_pixel_frames; p = c.policy; "
    "print(json.dumps({'two_minutes': blocks * c.block_tokens * token, "
    "'checkpoint': (p.sink + p.recent) * c.block_tokens * token, "
    "'archive': c.compressed_tokens * token}))"
)
# Of an environment that has NVIDIA ModelOpt; without it the table has no row for it.
MODELOPT = os.environ.get("MODELOPT_PYTHON", "")
QUANTIZED = (
    ("cache8", "fp32", "--cache-dtype int8"),
    ("int8", "fp32", "--weight-dtype int8"),
    ("int8-cache8", "fp32", "--weight-dtype int8 --cache-dtype int8"),
    ("int4", "fp32", "--weight-dtype int4"),
    ("fp8", "fp32", "--weight-dtype fp8"),
    ("fp8-cachefp8", "fp32", "--weight-dtype fp8 --cache-dtype fp8"),
    ("fp16-cache8", "fp16", "--cache-dtype int8"),
)

RUNS = {
    "sizes": Run((("-c", SIZES),), 0.1, plans.size_values),
    "plan": Run(
        (packforcing(plans.PLAN.removeprefix("packforcing ")),), 1, plans.plan_values,
        pictures={"docs/plan.png": pictures.drawn_by_the_command},
    ),
    "bounds": Run(
        tuple(packforcing(line.removeprefix("packforcing ")) for line in plans.BOUNDS.values()),
        0.5,
        plans.bound_values,
    ),
    "frame-rates": Run(
        tuple(packforcing(line.removeprefix("packforcing ")) for line in plans.FRAME_RATES),
        0.5,
        plans.frame_rate_values,
    ),
    "edge": Run(
        tuple(
            packforcing(line.removeprefix("packforcing "))
            for line in (*plans.EDGE_PLANS, *plans.EDGE_RATES)
        ),
        0.5,
        plans.edge_values,
    ),
    "page": Run(
        (benchmark("page_picture --out docs/serve.png"),), 2, lambda results: {},
        pictures={"docs/serve.png": pictures.drawn_by_the_command},
    ),
    "self-forcing": Run(
        (
            packforcing(plans.SELF_FORCING.removeprefix("packforcing ")),
            packforcing("plan --model self-forcing --policy packforcing --history 2,16,2"),
        ),
        1,
        plans.self_forcing_values,
    ),
    "bench": Run(
        (benchmark("peers --json {out}/bench.json"),), 6, values.bench_values
    ),
    "checkpoints": Run(
        (benchmark("bench_runtime --only checkpoints --json {out}/bench.json"),), 2,
        values.checkpoint_values,
    ),
    "stream": Run(
        (benchmark("bench_stream --json {out}/stream.json"),), 3, values.stream_values
    ),
    "stop": Run((benchmark("bench_stop --json {out}/stop.json"),), 1, values.stop_values),
    "viewers": Run((full_test("tests/app/test_live_load.py"),), 11, values.viewers_values),
    "hour": Run(
        (full_test("tests/end_to_end/test_demo.py -k 'hour and 60'"),), 150, values.hour_values
    ),
    "policies": Run(
        (packforcing(
            "compare --seconds 120 --prompts 16 --threads 1 --out {out} --policy "
            "packforcing,packforcing-likeness,packforcing-recency,packforcing-random,"
            "sliding-window,sink-window"
        ),),
        360,
        values.policy_values,
        pictures={
            "docs/demo.png": pictures.draw_demo,
            "docs/results/curves.png": pictures.draw_curves,
            "docs/results/tours.png": pictures.draw_tours,
        },
    ),
    "last-step": Run(
        (packforcing(
            "compare --seconds 120 --prompts 3 --threads 1 --out {out} --policy "
            "packforcing,packforcing-last-step"
        ),),
        15,
        values.last_step_values,
    ),
    "spans": Run(
        (packforcing(
            "compare --seconds 120 --prompts 8 --threads 1 --out {out} --policy "
            "packforcing,packforcing-half-span,packforcing-quarter-span"
        ),),
        90,
        values.span_values,
    ),
    "ten-minutes": Run(
        (packforcing(
            "compare --seconds 600 --prompts 4 --threads 1 --out {out} --policy packforcing"
        ),),
        90,
        values.ten_minutes_values,
    ),
    "retrieval": Run(
        (full_test("tests/evaluation -k landmarks"),), 10, values.retrieval_values
    ),
    "reference": Run(
        (full_test("tests/evaluation -k reference_measures"),), 15, values.reference_values
    ),
    "filters": Run(
        (benchmark("compare_filters --prompts 8 --seconds 2 --json {out}/filters.json"),), 5,
        values.filter_values,
    ),
    "bundles": Run(
        (
            packforcing("export --out {out}/fp32"),
            packforcing("export --dtype fp16 --out {out}/fp16"),
            ("-c", DRAW_PROMPTS, "{out}/prompts.txt"),
            *(
                packforcing(
                    f"calibrate --bundle {{out}}/{exact} --prompts {{out}}/prompts.txt --seconds 5 "
                    f"--out {{out}}/{exact}.safetensors"
                )
                for exact in ("fp32", "fp16")
            ),
            *(
                packforcing(
                    f"quantize --bundle {{out}}/{exact} {options} "
                    f"--calibration {{out}}/{exact}.safetensors --out {{out}}/{name}"
                )
                for name, exact, options in QUANTIZED
            ),
        ),
        15,
        lambda results: {},
    ),
    "layers": Run(
        (benchmark("ablate_layers {bundles}/fp32 --json {out}/layers.json"),), 3,
        values.layer_values, needs=("bundles",),
    ),
    "cache-choices": Run(
        (benchmark(
            "ablate_cache {bundles}/fp32 --prompts 12 --fit 32 --seconds 5 "
            "--json {out}/schemes.json"
        ),),
        60,
        values.cache_choice_values,
        needs=("bundles",),
    ),
    "quantizers": Run(
        (benchmark(
            "compare_quantizers {bundles}/fp32 --prompts 4 --seconds 5 --json {out}/tools.json"
            + (f" --modelopt {MODELOPT}" if MODELOPT else "")
        ),),
        4,
        values.quantizer_values,
        needs=("bundles",),
    ),
    "quantized": Run(
        (packforcing(
            "compare --bundle {bundles}/fp32 --with {bundles}/cache8 --with {bundles}/int8 "
            "--with {bundles}/int8-cache8 --with {bundles}/int4 --with {bundles}/fp8 "
            "--with {bundles}/fp8-cachefp8 --with {bundles}/fp16 "
            "--prompts 16 --seconds 5 --out {out}"
        ),),
        45,
        values.quantized_values,
        needs=("bundles",),
    ),
    "products": Run(
        (
            *(
                packforcing(
                    f"quantize --bundle {{bundles}}/fp32 --weight-dtype {dtype} "
                    f"--calibration {{bundles}}/fp32.safetensors --out {{out}}/{dtype}"
                )
                for dtype in ("w8a8", "nvfp4")
            ),
            packforcing(
                "compare --bundle {bundles}/fp32 --with {out}/w8a8 --with {out}/nvfp4 "
                "--prompts 16 --seconds 5 --out {out}"
            ),
        ),
        10,
        values.product_values,
        needs=("bundles",),
    ),
    "attention": Run(
        (
            packforcing("export --out {out}/fp32"),
            ("-c", DRAW_TWELVE, "{out}/prompts.txt"),
            packforcing(
                "calibrate --bundle {out}/fp32 --prompts {out}/prompts.txt --seconds 3 "
                "--out {out}/statistics.safetensors"
            ),
            benchmark(
                "ablate_attention {out}/fp32 --calibration {out}/statistics.safetensors "
                "--prompts 6 --seconds 3 --json {out}/attention.json"
            ),
        ),
        12,
        values.attention_values,
    ),
    "cache": Run(
        (packforcing(
            "compare --bundle {bundles}/fp16 --with {bundles}/fp16-cache8 --prompts 16 "
            "--seconds 120 --out {out}"
        ),),
        120,
        values.cache_values,
        needs=("bundles",),
    ),
    "full-size": Run(
        (
            packforcing("export --model wan-1.3b --random-weights --out {out}/wan"),
            packforcing("build --bundle {out}/wan --target sm86,sm89,sm120"),
            packforcing("verify --bundle {out}/wan --out {out}/verify"),
        ),
        15,
        plans.full_size_values,
    ),
    "builder": Run(
        (full_test("tests/calibration -k 'engine_takes and 30'"),), 25, plans.builder_values
    ),
}  # fmt: skip
