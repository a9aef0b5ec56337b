"""The command that renders many videos: `batch`."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from packforcing.app.cli.executors import executor_options, open_executor
from packforcing.app.cli.options import (
    FILE,
    FOLDER,
    POLICY_HELP,
    SHARD,
    backend_option,
    bundle_option,
    encoder_attrs,
    option,
    seconds_option,
    strict_option,
)
from packforcing.app.cli.output import make_folder
from packforcing.app.cli.process import handle_signals
from packforcing.app.cli.progress import batch_meter, print_status
from packforcing.app.cli.prompts import check_encoder_is_needed, encode_schedule
from packforcing.app.cli.videos import bundle_and_policy
from packforcing.errors import ConfigError

if TYPE_CHECKING:
    from packforcing.app.jobs.batch_file import BatchJob
    from packforcing.app.jobs.deal import Executor
    from packforcing.app.jobs.records import JobRecord
    from packforcing.app.jobs.renders import Renders
    from packforcing.config import Policy

SHOWN_MISTAKES = 20


@click.command()
@click.argument("jobs", type=FILE, metavar="JOBS")
@option("--out", type=FOLDER, metavar="DIR", required=True, help="Folder for the results.")
@bundle_option()
@seconds_option(10.0, "Length of videos whose job states none.")
@option("--seed", default=0, show_default=True, help="Seed of videos whose job states none.")
@option(
    "--policy",
    metavar="NAME",
    help=f"For jobs that state none. {POLICY_HELP} TensorRT engines refuse all but the bundle's.  "
    "[default: the bundle's]",
)
@option(
    "--encoder", help="Encode the prompts first, with UMT5 from this folder or file.",
    **encoder_attrs,
)  # fmt: skip
@strict_option
@executor_options
@option(
    "--shard",
    type=SHARD,
    metavar="I/N",
    default="1/1",
    help="Render part I of N alone, 1/N to N/N: every N-th job.  [default: all]",
)
@option(
    "--retry-failed", is_flag=True, help="Render failed jobs again, too. Else they stay failed."
)
@backend_option
def batch(
    jobs: Path,
    out: Path,
    bundle: Path | None,
    seconds: float,
    seed: int,
    policy: str | None,
    encoder: Path | None,
    strict: bool,
    workers: int | None,
    per_gpu: int | None,
    ray: str | None,
    shard: tuple[int, int],
    retry_failed: bool,
    backend: str,
) -> None:
    """Render every job of the file JOBS.

    JOBS is text with a prompt in each line, CSV whose first line names the columns, or JSONL. A job
    has prompt, or embedding or schedule with the name of a file; and optionally id, seconds, seed
    or seeds, start and policy. Without id, the prompt makes one; each of seeds makes a video, as
    ID-s1. All jobs are checked before the first one is rendered.

    Writes ID.mp4 and ID.json for each job, results.jsonl, and index.html with all videos. The same
    command again renders what is missing or has changed, and resumes what was interrupted.
    Several runs with one DIR share the work, also from several machines.

    Exit code 1 says that a job failed.

    \b
    Examples:
      packforcing batch prompts.txt --out night --seconds 30 --workers 2
      packforcing batch jobs.jsonl --out night --bundle my-bundle --backend tensorrt-rtx
      packforcing batch jobs.csv --out /scratch/night --shard 3/8
      packforcing batch jobs.jsonl --out /shared/night --backend tensorrt-rtx --ray
    """
    from packforcing.app.jobs.batch import add_job, find_work, read_records, share_of
    from packforcing.app.jobs.batch_file import BatchFile
    from packforcing.app.jobs.renders import Renders
    from packforcing.app.jobs.shares import Videos
    from packforcing.presets import policies
    from packforcing.runtime.backends import ENGINE_BACKENDS
    from packforcing.runtime.bundle import bundle_digest, read_manifest
    from packforcing.runtime.video_files import check_output

    directory, config, _ = bundle_and_policy(bundle)
    file = BatchFile(
        jobs,
        config,
        policies(config),
        seconds=seconds,
        seed=seed,
        policy=policy,
        encoding=encoder is not None,
        one_policy=backend in ENGINE_BACKENDS,
    )
    _refuse_mistakes(jobs, file.mistakes)
    if encoder is not None:
        check_encoder_is_needed(config, [switch for job in file.jobs for switch in job.prompts])
    received: list[int] = []
    with open_executor(backend, workers, per_gpu, ray) as executor:
        folder, digest = make_folder(out), bundle_digest(read_manifest(directory))
        mine = share_of(file.jobs, shard)
        reasons = find_work(
            folder, mine, config, digest, retry_failed=retry_failed, encoding=encoder is not None
        )
        pending = {job.id: job for job in mine if job.id in reasons}
        frames = {job.id: config.frames(job.seconds) for job in pending.values()}
        longest: dict[Policy | None, float] = {}
        for job in pending.values():
            longest[job.policy] = max(job.seconds, longest.get(job.policy, 0))
        bundle_path = directory.absolute()
        videos = tuple(Videos(bundle_path, *each) for each in longest.items())
        work = Renders(bundle_path, digest, folder.absolute(), backend, videos)
        if pending:
            check_output(folder / "all.mp4", sum(frames.values()), config.width, config.height)
            executor.check(work)
        _print_work(mine, reasons)
        if encoder is not None:
            pending |= _encode(
                [job for job in pending.values() if reasons[job.id] != "unfinished"],
                encoder,
                strict,
            )
        for job in pending.values():
            add_job(folder, job, reasons[job.id], config, digest)
        try:
            if pending:
                _render(executor, work, frames, received)
        finally:
            records = read_records(folder, file.jobs)
            _write_results(jobs, folder, file.jobs, records)
    ended = [record for job in mine if (record := records.get(job.id)) and record.result]
    failed = [record for record in ended if record.result and record.result.error]
    for record in failed:
        click.echo(f"{record.id}: failed: {record.result.error if record.result else ''}", err=True)
    click.echo(f"{folder / 'index.html'}: {len(ended) - len(failed)} of {len(mine)} videos")
    if received:
        left = len(mine) - len(ended)
        click.echo(
            f"stopped; {left} of {len(mine)} jobs are left: the same command resumes them", err=True
        )
        raise click.exceptions.Exit(128 + received[0])
    if failed:
        raise click.exceptions.Exit(1)


def _refuse_mistakes(path: Path, mistakes: list[str]) -> None:
    """Print what is wrong with the lines of a file, each in a line."""
    if not mistakes:
        return
    if len(mistakes) == 1:
        raise ConfigError(mistakes[0])
    for mistake in mistakes[:SHOWN_MISTAKES]:
        click.echo(" ".join(mistake.split()), err=True)
    raise ConfigError(f"{len(mistakes)} lines of {path} cannot be rendered, so nothing was")


def _print_work(jobs: Sequence[BatchJob], reasons: dict[str, str]) -> None:
    """Say how much there is to do and why, and name what is rendered again."""
    counts = Counter(reason.partition(":")[0] for reason in reasons.values())
    parts = [f"{len(jobs)} jobs", f"{len(jobs) - len(reasons)} done"]
    parts += [f"{count} {reason}" for reason, count in counts.items()]
    click.echo(", ".join(parts), err=True)
    for job_id, reason in reasons.items():
        if reason not in ("new", "unfinished"):
            click.echo(f"{job_id}: {reason}", err=True)


def _encode(jobs: list[BatchJob], encoder: Path, strict: bool) -> dict[str, BatchJob]:
    """Encode the words of jobs, each once; return the jobs by ID."""
    from packforcing.app.jobs.batch_file import with_embeddings, words_of
    from packforcing.embeddings import Embedding
    from packforcing.prompts import Switch

    if not (words := words_of(jobs)):
        return {}
    encoded = encode_schedule([Switch(0, text) for text in words], encoder, strict, quiet=False)
    embeddings = {
        text: switch.prompt
        for text, switch in zip(words, encoded)
        if isinstance(switch.prompt, Embedding)
    }
    return {job.id: with_embeddings(job, embeddings) for job in jobs}


def _render(executor: Executor, work: Renders, frames: dict[str, int], received: list[int]) -> None:
    """Render jobs, whose frames are by ID; note the signal that ends it."""
    from packforcing.app.jobs.deal import Stop

    stop = Stop()

    def end(number: int, frame: object) -> None:
        for other, handler in handlers.items():  # of the program: they end it at once
            signal.signal(other, handler)
        received.append(number)
        stop()

    with batch_meter(frames, executor.size(len(frames))) as show, handle_signals(end) as handlers:
        print_status(f"loading {work.bundle} ...", False)
        executor.render(work, [*frames], show, stop)


def _write_results(
    path: Path, folder: Path, jobs: Sequence[BatchJob], records: dict[str, JobRecord]
) -> None:
    from packforcing.app.jobs.batch import write_results
    from packforcing.app.reports.batch import write_page

    write_results(folder, records.values())
    write_page(folder, path.stem, [records.get(job.id) or job.id for job in jobs])
    sys.stdout.flush()
