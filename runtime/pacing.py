"""Keep a live video close to its viewer: neither far ahead nor silently behind."""

from __future__ import annotations

import time
from collections.abc import Callable


class PlaybackClock:
    """Where a viewer is who plays every block as soon as possible.

    Playback begins with the first block and runs at the video's rate. Where it has shown all that
    there is, it waits for the next block.

    Attributes:
        behind_seconds: How long playback has waited so far.
    """

    def __init__(
        self, fps: float, lead_seconds: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Make a clock.

        Args:
            fps: Frames per second of the video.
            lead_seconds: How much of the video may be made and not yet be shown.
            now: Returns seconds.
        """
        self._fps, self._lead, self._now = fps, lead_seconds, now
        self._frames, self._began = 0, 0.0
        self._paused_at: float | None = None
        self.behind_seconds = 0.0

    def add(self, frames: int) -> None:
        """Take note that frames are there now."""
        now = self._now()
        if not self._frames:
            self._began = now
        elif (late := now - self._began - self._frames / self._fps) > 0:
            self._began += late
            self.behind_seconds += late
        self._frames += frames

    def wait_seconds(self) -> float:
        """Return how long to wait before the next block may begin."""
        if not self._frames or self._paused_at is not None:
            return 0.0
        unseen = self._began + self._frames / self._fps - self._now()
        return max(0.0, unseen - self._lead)

    def pause(self) -> None:
        """Stop playback, until `proceed`."""
        if self._paused_at is None:
            self._paused_at = self._now()

    def proceed(self) -> None:
        """End a pause: playback goes on where it was."""
        if self._paused_at is not None:
            self._began += self._now() - self._paused_at
            self._paused_at = None
