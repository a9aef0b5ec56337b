"""Commands that measure videos: evaluate, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from packforcing.app.cli.options import (
    json_option,
    run_options,
    seed_option,
)
from packforcing.app.cli.output import print_json
from packforcing.app.cli.progress import (
    count_progress,
)
from packforcing.app.cli.settings import (
    policy_by_name,
)
from packforcing.errors import (
    ConfigError,
)

if TYPE_CHECKING:
    pass

MOST_PROMPTS = 10_000


@click.command()
@click.argument("videos", metavar="VIDEO...", nargs=-1, required=True)
@click.option(
    "--prompt",
    metavar="TEXT",
    help="What the demo model was asked to show: adds what its own detectors see.",
)
@json_option
def evaluate(videos: tuple[str, ...], prompt: str | None, as_json: bool) -> None:
    """Measure how each VIDEO holds, ten seconds at a time.

    Consistency of subject and background, colour drift, motion, smoothness and flicker, of any
    video; of the demo model's also whether colour, shape and ground are as the PROMPT says, and
    whether places look the same on return. Nothing is downloaded; a video of any length is read in
    bounded memory. docs/compare.md defines the measures.

    \b
    Example:
      packforcing evaluate square.mp4 --prompt "a blue square over sand checks"
    """
    from packforcing.evaluation.measures import evaluate_video, evaluations_json, measure_table
    from packforcing.evaluation.video_reader import probe_video

    for video in videos:  # all of them before the first is read
        probe_video(Path(video))
    evaluations = []
    for video in videos:
        with count_progress("frame", quiet=as_json) as on_frame:
            evaluations.append(evaluate_video(video, prompt, on_frame))
    if as_json:
        print_json(evaluations_json(evaluations))
    else:
        click.echo("\n\n".join("\n".join(measure_table(one)) for one in evaluations))


@click.command()
@click.argument("bundle", required=False)
@click.option(
    "--policies",
    metavar="NAME,...",
    help="Ways to remember; the others are compared with the first. An unknown name makes the "
    "command list the known ones.  [default: packforcing,sliding-window,sink-window]",
)
@click.option(
    "--with",
    "others",
    metavar="DIR",
    multiple=True,
    help="A bundle that was quantised of BUNDLE, to be compared with it, under its own policy; "
    "can be given several times, instead of --policies.",
)
@click.option("--seconds", default=120.0, show_default=True, help="Length of every video.")
@click.option(
    "--prompts",
    metavar="N|FILE",
    default="4",
    show_default=True,
    help="How many to make up, for the demo model; or a file with a prompt in each line, or with "
    "the name of a file of encode-prompt.",
)
@seed_option
@click.option(
    "--out", metavar="DIR", default="out/compare", show_default=True, help="Folder for the results."
)
@run_options
@json_option
def compare(
    bundle: str | None,
    policies: str | None,
    others: tuple[str, ...],
    seconds: float,
    prompts: str,
    seed: int,
    out: str,
    threads: int | None,
    backend: str,
    as_json: bool,
) -> None:
    """Render and measure prompts under several policies.

    Prompts and seeds are the same for all of them. With --with, by several bundles: how much is
    lost with what was quantised of BUNDLE. Without BUNDLE, of the demo model that comes along.
    Writes the videos, compare.json and compare.html, a page with tables, curves, pictures and what
    each block read. What is finished is not rendered again: after an interruption, or with a policy
    more, the same command goes on.

    \b
    Examples:
      packforcing compare --policies packforcing,sliding-window --seconds 120 --prompts 16
      packforcing compare half --with eight --seconds 5 --prompts 16
    """
    from packforcing.app.reports import compare as compare_report
    from packforcing.evaluation.compare import run_comparison
    from packforcing.evaluation.policies import comparison_policies
    from packforcing.evaluation.prompt_sets import draw_prompts, read_prompts
    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest

    compare_report.check_matplotlib()
    directory = Path(bundle) if bundle is not None else demo_bundle()
    config = read_manifest(directory).config
    if others and policies:
        raise ConfigError("--with compares bundles, --policies policies: leave one of them out")
    if others:
        chosen = {directory.resolve().name: config.policy}
    else:
        names = (policies or "packforcing,sliding-window,sink-window").split(",")
        known = comparison_policies(config)
        chosen = {name: policy_by_name(name, known) for name in map(str.strip, names)}
    if prompts.isdecimal():
        if not 0 < int(prompts) <= MOST_PROMPTS:
            raise ConfigError(f"--prompts takes 1 to {MOST_PROMPTS}; it is {prompts}")
        asked = draw_prompts(config, int(prompts), seed)
    else:
        asked = read_prompts(Path(prompts), seed)
    folder = Path(out)
    with count_progress("frame", quiet=as_json) as progress:
        found = run_comparison(
            directory, chosen, asked, seconds, folder,
            others={Path(path).resolve().name: Path(path) for path in others},
            backend=backend, threads=threads, progress=progress,
        )  # fmt: skip
    page = compare_report.write_report(folder, found)
    if as_json:
        click.echo((folder / "compare.json").read_text(encoding="utf-8"), nl=False)
    else:
        click.echo("\n".join(compare_report.table(found)))
        click.echo(f"\nreport: {page}")
