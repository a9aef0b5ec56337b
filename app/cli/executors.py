"""Options that say where videos are rendered: in this process, in several, or by Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from packforcing.app.cli.options import option, options
from packforcing.errors import ConfigError

if TYPE_CHECKING:
    from packforcing.app.jobs.deal import Executor

executor_options = options(
    option(
        "--workers",
        type=click.IntRange(1, 1024),
        metavar="N",
        help="Videos at once, in a process each.  [default: 1 on the CPU, else one for each GPU]",
    ),
    option(
        "--per-gpu",
        type=click.IntRange(1, 64),
        metavar="N",
        help="Videos at once on each GPU, instead of --workers.",
    ),
    option(
        "--ray",
        is_flag=False,
        flag_value="auto",
        metavar="[HOST:PORT]",
        help="Render on the nodes of the Ray cluster that this machine is a node of. All need the "
        "folder of results under the same path.",
    ),
)


@contextmanager
def open_executor(
    backend: str, workers: int | None, per_gpu: int | None, ray: str | None
) -> Iterator[Executor]:
    """Yield what renders, by the options.

    Raises:
        ConfigError: `per_gpu` is set and the backend runs on the CPU.
        BackendError: No such backend, or it needs a GPU and there is none; or no Ray cluster.
        MissingDependency: A package is not installed.
    """
    from packforcing.runtime.backends import check_backend, visible_gpus

    if workers and per_gpu:
        raise click.UsageError("--workers and --per-gpu exclude each other")
    check_backend(backend)
    if per_gpu and backend == "onnxruntime":
        raise ConfigError(f"{backend} runs on the CPU: set --workers instead of --per-gpu")
    if ray is not None:
        from packforcing.app.jobs.ray_actors import connect_cluster

        with connect_cluster(ray, backend, workers, per_gpu) as cluster:
            yield cluster
    else:
        from packforcing.app.jobs.processes import ThisMachine

        gpus = visible_gpus(backend)
        yield ThisMachine(workers or len(gpus) * (per_gpu or 1) or 1, gpus)
