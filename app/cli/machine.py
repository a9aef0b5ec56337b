"""Commands about this machine and its memory: doctor, plan."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packforcing.app.cli.options import (
    json_option,
    shape_options,
)
from packforcing.app.cli.output import print_json
from packforcing.app.cli.settings import (
    budget_bytes,
    shaped,
    stored_precision,
)
from packforcing.errors import (
    ConfigError,
)

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("bundle", required=False)
@click.option("--model", "model_name", metavar="NAME", help="Which model: demo or wan-1.3b.")
@click.option(
    "--budget",
    metavar="GIB[,GIB...]",
    help="Memory on the card for everything but the CUDA context, in GiB.  "
    "[default: what the model asks for]",
)
@click.option(
    "--target",
    "targets",
    metavar="NAME[,NAME...]",
    help="What the card is, like sm86 (RTX 30), sm89 (RTX 40) or sm120 (RTX 50).  "
    "[default: what BUNDLE was built for, or sm86]",
)
@click.option("--gpu", metavar="NAME", help='A card by name, like "RTX 4060": target and budget.')
@shape_options
@click.option(
    "--precision",
    metavar="WEIGHTS,CACHE",
    help="Number formats to keep to, like fp16,int8.  [default: the best that fits]",
)
@click.option(
    "--seconds", default=60.0, show_default=True, help="Length of the video, for the archive."
)
@click.option("--picture", metavar="FILE.png", help="Draw what fills the budgets.")
@json_option
def plan(
    bundle: str | None,
    model_name: str | None,
    budget: str | None,
    targets: str | None,
    gpu: str | None,
    precision: str | None,
    seconds: float,
    picture: str | None,
    as_json: bool,
    **shape: Any,
) -> None:
    """Show what takes memory on a card, and what fits.

    Needs no weights, GPU or engine. Given a budget, gives up precision before history until all
    of it fits; several budgets or targets make a table. Of a BUNDLE whose engines are built, the
    builder's figures replace the estimates, and on a GPU those of the loaded engines stand
    beside them. Exit code 2 if the one budget asked for is too small.

    \b
    Examples:
      packforcing plan --model wan-1.3b --gpu "RTX 4060"
      packforcing plan --model wan-1.3b --budget 4,6,8,12 --target sm86,sm89,sm120
      packforcing plan my-bundle
    """
    from packforcing.app.reports import plan as plan_report
    from packforcing.errors import PlanError
    from packforcing.presets import model_config
    from packforcing.runtime.bundle import read_manifest
    from packforcing.runtime.estimate import find_gpu
    from packforcing.runtime.plan import CUDA_CONTEXT, Plan, choose
    from packforcing.units import GIB

    engines = None
    if bundle is None:
        config = shaped(model_config(model_name or "wan-1.3b"), **shape)
        kept = stored_precision(precision, config)
    else:
        if model_name or precision or any(shape.values()):
            raise ConfigError("a bundle has its model, sizes, history and precision already")
        config, kept = read_manifest(bundle).config, None
        engines = plan_report.measured(Path(bundle))
    budgets = [None] if budget is None else budget_bytes(budget)
    known = engines.targets[:1] if engines else ()
    names = [name.strip() for name in targets.split(",")] if targets else [*known, "sm86"][:1]
    if gpu is not None:
        if targets is not None:
            raise ConfigError("choose one of --gpu and --target")
        card = find_gpu(gpu)
        names = [card.target]
        if budget is None:
            budgets = [card.memory * GIB - CUDA_CONTEXT]
    rows: list[tuple[int | None, str, Plan | PlanError]] = []
    for wanted, target in product(budgets, names):
        try:
            found = choose(
                config, target, wanted, precision=kept, seconds=seconds,
                built=engines and engines.built,
                any_autoencoder=bundle is None and shape["vae"] is None,
            )  # fmt: skip
            rows.append((wanted, target, found))
        except PlanError as error:
            if len(budgets) * len(names) == 1:
                raise
            rows.append((wanted, target, error))
    if picture is not None:
        plan_report.draw(rows, config, Path(picture))
    if as_json:
        print_json(plan_report.described(rows, config, engines))
        return
    match rows:
        case [(wanted, _, Plan() as only)]:
            lines = plan_report.detail(wanted, only, seconds, engines)
        case _:
            free = kept is None and bundle is None
            lines = plan_report.table(rows, config, free)
    click.echo("\n".join(lines))


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine can export, build and run.

    Every "no" comes with what to do about it. Nothing is changed, no model is loaded.

    \b
    Example:
      packforcing doctor
    """
    import msgspec

    from packforcing.runtime.doctor import diagnose

    found = diagnose(Path.cwd())
    if as_json:
        print_json(msgspec.to_builtins(found))
        return
    memory, total = (f"{count / 2**30:.1f}" for count in (found.memory_free, found.memory_total))
    click.echo(f"packforcing {found.packforcing}, Python {found.python}, {found.system}")
    click.echo(f"CPU     {found.cpu_cores} cores, {memory} of {total} GiB memory free")
    click.echo(f"disk    {found.disk_free / 2**30:.1f} GiB free in {Path.cwd()}")
    if found.driver:
        cuda = "{}.{}".format(*found.driver.cuda)
        click.echo(f"driver  NVIDIA {found.driver.version}, runs CUDA up to {cuda}")
    for gpu in found.gpus:
        free, total = (f"{count / 2**30:.1f}" for count in (gpu.memory_free, gpu.memory_total))
        click.echo(f"GPU {gpu.index}   {gpu.name} ({gpu.target}), {free} of {total} GiB free")
    if found.no_gpu:
        click.echo(f"GPU     {found.no_gpu}")
    click.echo("")
    for capability in found.capabilities:
        answer = "yes" if capability.able else "no"
        click.echo(f"{answer:<4} {capability.name:<30} {capability.detail}")
