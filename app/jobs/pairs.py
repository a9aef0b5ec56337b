"""The pairs of a comparison as work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packforcing.app.jobs.deal import Executor, Place, Render, Stop
from packforcing.app.jobs.events import Ended, Event, Made, Retired
from packforcing.app.jobs.shares import Needs, Videos, worker_needs
from packforcing.errors import BackendError
from packforcing.runtime.bundle import bundle_digest, read_manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from packforcing.evaluation.pairs import OnShare, PairRenderer

_STEPS = 1000  # that reports divide a pair into


@dataclass(frozen=True)
class Pairs:
    """Pairs of a policy, or a bundle, and a prompt.

    Attributes:
        renderer: Renders and measures them.
        folder: Of the results.
    """

    renderer: PairRenderer
    folder: Path

    @property
    def bundles(self) -> dict[Path, str]:
        """All that are compared."""
        paths = {*self.renderer.bundles.values()}
        return {path: bundle_digest(read_manifest(path)) for path in paths}

    def needs(self, target: str | None = None) -> Needs:
        """Return what a worker takes, on a GPU of an architecture or on the CPU."""
        pairs = self.renderer
        videos = [
            Videos(path, pairs.policies[name], pairs.seconds)
            for name, path in pairs.bundles.items()
        ]
        return worker_needs(videos, pairs.backend, target)

    @contextmanager
    def open(self, place: Place, stop: Stop) -> Iterator[Render]:
        """Yield what renders and measures a pair. A stop takes effect after it."""
        with self.renderer.open(place.device) as render:

            def render_pair(name: str, on_event: Callable[[Event], None]) -> None:
                render(name, lambda share: on_event(Made(name, round(share * _STEPS), False)))
                on_event(Ended(name, "completed"))

            yield render_pair

    def fail(self, job_id: str, error: str) -> Ended:
        """Give up all: a comparison needs every pair."""
        raise BackendError(f"{job_id}: {error}")


def render_pairs_by(
    executor: Executor,
    folder: Path,
    renderer: PairRenderer,
    on_share: OnShare,
    on_failure: Callable[[str], None],
) -> None:
    """Render and measure all pairs of a renderer.

    Args:
        executor: Where.
        folder: Of the results.
        renderer: Has the pairs.
        on_share: Called with the name of a pair and the share of it that is done.
        on_failure: Called where a worker cannot work, with why; others may.

    Raises:
        PackForcingError: A pair cannot be rendered or measured.
    """

    def show(number: int, event: Event) -> None:
        if isinstance(event, Made):
            on_share(event.id, event.frames / _STEPS)
        elif isinstance(event, Ended):
            on_share(event.id, 1)
        elif isinstance(event, Retired):
            on_failure(event.error)

    work = Pairs(renderer, folder)
    executor.check(work)
    executor.render(work, [*renderer.jobs], show, Stop())
