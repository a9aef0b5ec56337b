"""Render on the nodes of a Ray cluster: workers are actors.

An actor reports through a streaming generator and gets its jobs by calls, as a process does through
its pipe. Ray places actors by what they take: a part of the node's GPUs, CPU cores and memory. It
enforces none of that; the plan's bytes are a promise. Actors are not restarted by Ray: one that has
died, with its node or alone, is replaced here, wherever there is room.

Results are files, so all nodes need the same folder under the same path. `NodeCheck` runs on every
node before anything else, and once more in every actor.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple
from uuid import uuid4

from packforcing import __version__
from packforcing.app.jobs.deal import (
    Gone,
    Message,
    OnEvent,
    Place,
    Ready,
    Stop,
    Work,
    render_by,
    serve,
)
from packforcing.app.jobs.shares import check_per_gpu, cpu_share, gpu_part
from packforcing.errors import BackendError, BundleError, ConfigError, OutputError, PackForcingError
from packforcing.extras import optional_imports
from packforcing.runtime.bundle import bundle_digest, read_manifest
from packforcing.runtime.device import VisibleGpu
from packforcing.runtime.nvml import gpus
from packforcing.units import format_gib

_ANSWER_SECONDS = 300  # for a node to start Python and answer


@contextmanager
def connect_cluster(
    address: str, backend: str, workers: int | None, per_gpu: int | None
) -> Iterator[RayCluster]:
    """Connect to a Ray cluster that this machine is a node of.

    Args:
        address: HOST:PORT, or "auto" for the one that runs on this machine.
        backend: Runs the graphs.
        workers: How many; None: one for each node, or `per_gpu` for each GPU.
        per_gpu: Workers on each GPU; None: 1.

    Raises:
        MissingDependency: Ray is not installed.
        ConfigError: The address is that of a client.
        BackendError: There is no such cluster, or no node of it that the backend could run on.
    """
    if "://" in address:
        raise ConfigError(
            f"cannot render through {address}: results are files, so run the command on a node of "
            "the cluster, with --ray alone"
        )
    with optional_imports("rendering on a Ray cluster", "ray"):
        import ray
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's ends the process at once
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(
            f"no Ray cluster answers at '{address}' ({_first_line(error)}): make this machine a "
            "node of one, with 'ray start --head' or 'ray start --address HOST:PORT'"
        ) from error
    try:
        yield RayCluster(ray, backend != "onnxruntime", workers, per_gpu)
    finally:
        ray.shutdown()


class _Node(NamedTuple):
    id: str
    name: str
    cpus: float
    gpus: float
    memory: float  # bytes


class Share(NamedTuple):
    """What Ray reserves for a worker."""

    cpus: int
    gpus: float
    memory: int  # bytes


class RayCluster:
    """Divides the GPUs, or the CPU cores, of a cluster among actors; no more of them than jobs."""

    def __init__(self, ray: Any, on_gpus: bool, workers: int | None, per_gpu: int | None) -> None:
        """Count what a cluster has now; nodes that join later are used as well.

        Args:
            ray: The connected library.
            on_gpus: Whether workers run on GPUs.
            workers: How many; None: one for each node, or `per_gpu` for each GPU.
            per_gpu: Workers on each GPU; None: 1.

        Raises:
            BackendError: No node has a GPU, or a CPU core.
        """
        self._ray, self._on_gpus = ray, on_gpus
        self._nodes = [
            _Node(
                node["NodeID"],
                node["NodeManagerHostname"],
                *(node["Resources"].get(kind, 0) for kind in ("CPU", "GPU", "memory")),
            )
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("GPU" if on_gpus else "CPU", 0) >= 1
        ]
        if not self._nodes:
            raise BackendError(f"no node of the Ray cluster has a {'GPU' if on_gpus else 'CPU'}")
        count = sum(int(node.gpus) for node in self._nodes) if on_gpus else len(self._nodes)
        self._workers = workers or count * (per_gpu or 1)
        self._per_gpu = per_gpu or -(-self._workers // count)

    def size(self, jobs: int) -> int:
        return min(self._workers, jobs)

    def check(self, work: Work) -> None:
        with shared_check(work) as check:
            self._place(work, check, self._workers)

    def render(self, work: Work, ids: Sequence[str], on_event: OnEvent, stop: Stop) -> None:
        count = self.size(len(ids))
        with shared_check(work) as check:
            share = self._place(work, check, count)
            team = Actors(self._ray, work, count, share, check)
            render_by(team, work, ids, on_event, stop)

    def _place(self, work: Work, check: NodeCheck, count: int) -> Share:
        """Check every node, and return what each of so many workers takes of one."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ray = self._ray
        task = ray.remote(_check_node)
        answers = {}
        for node in self._nodes:
            here = NodeAffinitySchedulingStrategy(node.id, soft=False)
            on_node = task.options(num_cpus=0, max_retries=0, scheduling_strategy=here)
            answers[node] = on_node.remote(check, self._on_gpus)
        host_bytes = answered = 0
        for node, answer in answers.items():
            try:
                installed = ray.get(answer, timeout=_ANSWER_SECONDS)
            except ray.exceptions.RayTaskError as error:
                raise BackendError(
                    f"Ray node {node.name} cannot run packforcing: {_first_line(error)}"
                ) from error
            except ray.exceptions.RayError:  # it has died, or hangs
                continue
            if isinstance(installed, PackForcingError):
                raise BackendError(f"Ray node {node.name}: {installed}") from installed
            answered += 1
            for gpu in installed:
                needs = work.needs(gpu.target)
                check_per_gpu(self._per_gpu, needs.device, gpu)
                host_bytes = max(host_bytes, needs.host)
        if not answered:
            raise BackendError("no node of the Ray cluster answers")
        host_bytes = host_bytes or work.needs().host
        if not any(node.memory >= host_bytes for node in self._nodes):
            raise BackendError(
                f"a worker needs {format_gib(host_bytes, round_up=True)} GiB of host memory, and "
                "no node of the Ray cluster has so much"
            )
        if not self._on_gpus:
            return Share(cpu_share([node.cpus for node in self._nodes], count), 0, host_bytes)
        cpus = min(int(node.cpus // (node.gpus * self._per_gpu)) for node in self._nodes)
        return Share(cpus, gpu_part(self._per_gpu), host_bytes)


def _first_line(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return (str(cause) or type(cause).__name__).splitlines()[0]


@dataclass(frozen=True)
class NodeCheck:
    """Checks that a node can do what another one begins.

    Attributes:
        version: Of the package.
        token: A file in the folder of results that the driver has locked.
        bundles: SHA-256 of the manifests, by the bundles' folders.
    """

    version: str
    token: Path
    bundles: Mapping[Path, str]

    def run(self) -> None:
        """Check this node.

        Raises:
            BackendError: The package is of another version.
            OutputError: The folder of results is another one, or its locks are not shared.
            BundleError: A bundle is missing, or another one.
        """
        from filelock import FileLock, Timeout

        if __version__ != self.version:
            raise BackendError(
                f"it has packforcing {__version__} and the command {self.version}: install one "
                "version everywhere"
            )
        folder = self.token.parent
        if not self.token.exists():
            raise OutputError(
                f"it does not see the files that the command writes to {folder}: --ray needs a "
                "folder that all nodes share under one path"
            )
        try:
            with FileLock(self.token, timeout=0):
                pass
        except (Timeout, OSError):
            pass
        else:
            raise OutputError(
                f"it does not see locks of other nodes in {folder}, so videos could be made twice: "
                "use a file system with locks"
            )
        for path, digest in self.bundles.items():
            if bundle_digest(read_manifest(path)) != digest:
                raise BundleError(f"{path} is another bundle than on the node of the command")


def _check_node(check: NodeCheck, on_gpus: bool) -> list[VisibleGpu] | PackForcingError:
    try:
        check.run()
        installed = gpus() if on_gpus else []
    except PackForcingError as error:
        return error
    return [VisibleGpu(gpu.name, gpu.target, gpu.memory_total) for gpu in installed]


@contextmanager
def shared_check(work: Work) -> Iterator[NodeCheck]:
    """Yield what checks nodes for work, with a locked file in its folder.

    Raises:
        OutputError: The file cannot be written.
    """
    from filelock import FileLock

    token = work.folder / f".ray-{uuid4().hex}.lock"
    try:
        with FileLock(token):
            yield NodeCheck(__version__, token, work.bundles)
    except OSError as error:
        raise OutputError(f"cannot lock a file in {work.folder}: {error.strerror}") from error
    finally:
        token.unlink(missing_ok=True)


class _Actor:
    """Renders on a node; three of its methods run at once."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[str | None] = SimpleQueue()
        self._stop = Stop()

    def serve(self, work: Work, place: Place, check: NodeCheck) -> Iterator[Message]:
        """Yield what a worker reports; the last one is that it is gone."""
        messages: SimpleQueue[Message] = SimpleQueue()

        def run() -> None:
            try:
                check.run()
                serve(work, place, self._stop, self._jobs.get, messages.put)
                reason = "too early"
            except PackForcingError as error:
                messages.put(error)
                reason = "as its node cannot work"
            except BaseException as error:
                traceback.print_exc(file=sys.stderr)  # Ray has it in the logs of the node
                reason = f"with {type(error).__name__}"
            messages.put(Gone(reason))

        threading.Thread(target=run, name="packforcing-worker", daemon=True).start()
        while True:
            message = messages.get()
            yield message
            if isinstance(message, Gone):
                return

    def deal(self, job_id: str) -> None:
        self._jobs.put(job_id)

    def stop(self) -> None:
        self._stop()
        self._jobs.put(None)


class _Member:
    def __init__(self, team: Actors, number: int, handle: Any, reports: Any) -> None:
        self._team, self._number = team, number
        self.handle, self.reports, self.placed = handle, reports, False

    def deal(self, job_id: str) -> None:
        self.handle.deal.remote(job_id)

    def stop(self) -> None:
        if self.placed:
            self.handle.stop.remote()
        else:  # Ray has no room for it
            self.kill()

    def kill(self) -> None:
        self._team.end(self._number)


class Actors:
    """A team of actors.

    Args:
        ray: The connected library.
        work: What is rendered.
        size: How many there are.
        share: What Ray reserves for each.
        check: Runs in each before it renders.
    """

    def __init__(self, ray: Any, work: Work, size: int, share: Share, check: NodeCheck) -> None:
        self._ray, self.size = ray, size
        self._work = ray.put(work)
        self._place, self._check = Place(threads=max(1, share.cpus)), check
        self._class = ray.remote(_Actor).options(
            num_cpus=share.cpus, num_gpus=share.gpus, memory=share.memory,
            max_concurrency=3, max_restarts=0, scheduling_strategy="SPREAD",
        )  # fmt: skip
        self._members: dict[int, _Member] = {}
        self._ended: list[int] = []

    def start(self, number: int) -> _Member:
        handle = self._class.remote()
        reports = handle.serve.options(num_returns="streaming").remote(
            self._work, self._place, self._check
        )
        self._members[number] = _Member(self, number, handle, reports)
        return self._members[number]

    def receive(self, seconds: float) -> Iterator[tuple[int, Message]]:
        while self._ended:
            yield self._ended.pop(), Gone("as it was to")
        numbers = {member.reports: number for number, member in self._members.items()}
        if not numbers:
            return
        ready, _ = self._ray.wait([*numbers], timeout=seconds)
        if ready:  # and all others that are
            ready, _ = self._ray.wait([*numbers], num_returns=len(numbers), timeout=0)
        for reports in ready:
            number = numbers[reports]
            if number in self._members:
                yield number, self._message(number)

    def _message(self, number: int) -> Message:
        member = self._members[number]
        try:
            message: Message = self._ray.get(next(member.reports))
        except (self._ray.exceptions.RayError, StopIteration) as error:
            message = Gone(f"in Ray: {_first_line(error)}")
        if isinstance(message, Ready):
            member.placed = True
        elif isinstance(message, Gone):
            self._ray.kill(self._members.pop(number).handle)
        return message

    def end(self, number: int) -> None:
        """Kill an actor, wherever it is."""
        if (member := self._members.pop(number, None)) is not None:
            self._ray.kill(member.handle)
            self._ended.append(number)
