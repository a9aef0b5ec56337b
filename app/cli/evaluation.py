"""Commands that measure videos: evaluate, compare."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import click

from packforcing.app.cli.executors import executor_options, open_executor
from packforcing.app.cli.options import (
    FOLDER,
    NAMES,
    OTHER_CONTEXT,
    bundle_option,
    json_option,
    option,
    out_folder_option,
    run_options,
    seconds_option,
    seed_option,
)
from packforcing.app.cli.output import print_json, print_tables
from packforcing.app.cli.progress import count_meter
from packforcing.app.cli.settings import policy_by_name
from packforcing.errors import ConfigError
from packforcing.extras import optional_imports

MAX_PROMPTS = 10_000
DEFAULT_POLICIES = ("packforcing", "sliding-window", "sink-window")


@click.command()
@click.argument("videos", metavar="VIDEO...", nargs=-1, required=True)
@option(
    "--prompt",
    metavar="TEXT",
    help="Prompt of the video, for videos of the demo model: adds what its detectors see.",
)
@json_option
def evaluate(videos: tuple[str, ...], prompt: str | None, as_json: bool) -> None:
    """Measure consistency, drift and motion of videos.

    Measures are taken per ten seconds: consistency of subject and background, color drift, motion,
    smoothness and flicker. For the demo model also whether color, shape and background match the
    prompt, and whether places look the same on return. Memory is bounded for a video of any
    length. Nothing is downloaded. docs/compare.md defines the measures.

    Needs `pip install "packforcing[evaluate]"`.

    \b
    Example:
      packforcing evaluate square.mp4 --prompt "a blue square over sand checks"
    """
    with optional_imports("evaluating", "evaluate"):
        from packforcing.app.reports.measures import measure_table
        from packforcing.evaluation.measures import evaluate_video, evaluations_json
        from packforcing.evaluation.video_reader import probe_video

    for video in videos:  # all of them before the first is read
        probe_video(Path(video))
    evaluations = []
    for video in videos:
        with count_meter(f"evaluating {video}", "frames", quiet=as_json) as on_frame:
            evaluations.append(evaluate_video(video, prompt, on_frame))
    if as_json:
        print_json(evaluations_json(evaluations))
    else:
        for number, evaluation in enumerate(evaluations):
            print_tables(*([""] if number else []), *measure_table(evaluation))


@click.command()
@bundle_option()
@option(
    "--policy",
    aliases=["--policies"],
    type=NAMES,
    metavar="NAME[,NAME...]",
    help="Policies; the first is the baseline. An unknown name lists all. "
    f"{OTHER_CONTEXT}  [default: {','.join(DEFAULT_POLICIES)}]",
)
@option(
    "--with",
    "others",
    type=FOLDER,
    metavar="DIR",
    multiple=True,
    help="Bundle to compare with the first: of the same model, size, history and steps, in other "
    "dtypes, like a quantized one. May be repeated. Not with --policy.",
)
@seconds_option(120.0, "Length of every video.")
@option(
    "--task",
    type=click.Choice(["prompts", "recall"]),
    default="prompts",
    show_default=True,
    help="recall: worlds of the demo model in which places come back that only the history knows; "
    "--prompts is their number, --seed the first one's.",
)
@option(
    "--prompts",
    metavar="N|FILE",
    default="4",
    show_default=True,
    help="Number of prompts to draw, for the demo model; or a file with a prompt, or the name of "
    "an embedding produced by `encode-prompt`, per line.",
)
@seed_option
@out_folder_option("out/compare")
@executor_options
@run_options
@json_option
def compare(
    bundle: Path | None,
    policy: tuple[str, ...] | None,
    others: tuple[Path, ...],
    seconds: float,
    task: str,
    prompts: str,
    seed: int,
    out: Path,
    workers: int | None,
    per_gpu: int | None,
    ray: str | None,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Compare policies or bundles on the same prompts.

    Renders every prompt with the same seed under each policy and measures the videos. With --with,
    compares bundles instead, for example to measure quantization loss. Writes the videos,
    compare.json and compare.html: the videos side by side, a verdict, frames, tables and curves.
    Finished videos are not rendered again: running the command again resumes it, with further
    policies too.

    Needs `pip install "packforcing[cpu,evaluate,plot]"`.

    \b
    Examples:
      packforcing compare --policy packforcing,sliding-window --seconds 120 --prompts 16
      packforcing compare --bundle half --with eight --seconds 5 --prompts 16
      packforcing compare --task recall --policy packforcing,sink-window --seconds 60 --prompts 48
    """
    with optional_imports("the comparison", "evaluate", "plot"):
        import matplotlib  # noqa: F401  # before hours of rendering

        from packforcing.app.jobs.pairs import render_pairs_by
        from packforcing.app.reports import compare as report
        from packforcing.evaluation.compare import run_comparison
        from packforcing.evaluation.policies import comparison_policies
        from packforcing.evaluation.prompt_sets import draw_prompts, draw_worlds, read_prompts
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest

    directory = bundle or demo_bundle()
    config = read_manifest(directory).config
    if others and policy:
        raise ConfigError("--with compares bundles, --policy policies: leave one of them out")
    if others:
        policies = {directory.resolve().name: config.policy}
    else:
        by_name = comparison_policies(config)
        policies = {name: policy_by_name(name, by_name) for name in policy or DEFAULT_POLICIES}
    if prompts.isdecimal():
        if not 0 < int(prompts) <= MAX_PROMPTS:
            raise ConfigError(f"--prompts takes 1 to {MAX_PROMPTS}; it is {prompts}")
        if task == "recall":
            inputs = draw_worlds(config, int(prompts), seed, seconds)
        else:
            inputs = draw_prompts(config, int(prompts), seed)
    elif task == "recall":
        raise ConfigError("--task recall draws its own prompts: --prompts is a number of worlds")
    else:
        inputs = read_prompts(Path(prompts), seed)
    echo_error = partial(click.echo, err=True)
    with (
        open_executor(backend, workers, per_gpu, ray) as executor,
        count_meter("comparing", "frames", quiet=as_json) as on_frame,
    ):
        comparison = run_comparison(
            directory.absolute(), policies, inputs, seconds, out.absolute(),
            others={path.resolve().name: path.absolute() for path in others},
            backend=backend, threads=threads, progress=on_frame,
            render=partial(render_pairs_by, executor, out, on_failure=echo_error),
        )  # fmt: skip
    page = report.write_report(out, comparison)
    if as_json:
        print_json(json.loads((out / "compare.json").read_bytes()))
    else:
        print_tables(*report.tables(comparison))
        click.echo(f"\nreport: {page}")
