"""Decide which videos are made at once, by the memory that each of them takes."""

from __future__ import annotations

import msgspec

from packforcing.errors import ConfigError
from packforcing.runtime.allocations import device_bytes, memory_by_purpose
from packforcing.runtime.device import HostDevice
from packforcing.runtime.request import archive_memory
from packforcing.runtime.session import Session
from packforcing.runtime.video import Video
from packforcing.units import format_gib


class Room:
    """The memory of a session for videos, where their buffers are: on the GPU, or on the host."""

    def __init__(self, session: Session, available_bytes: int | None = None) -> None:
        """Measure the memory.

        Args:
            session: Makes no video yet.
            available_bytes: For all videos at once; None: what is free now.
        """
        device = session.backend.device
        self._own_policy = session.manifest.config.policy
        self._on_host = type(device) is HostDevice
        if available_bytes is None:
            available_bytes = device.free_memory()[0]
        self.available_bytes = available_bytes

    def video_bytes(self, video: Video) -> int:
        """Return what a video takes, as in the plan: its buffers, and on the host its archive."""
        config, request = video.config, video.request
        if (blocks := request.timeline.blocks) is not None:
            policy = request.policy.fit_to_video(blocks, self._own_policy)
            config = msgspec.structs.replace(config, policy=policy)
        if not self._on_host:
            return sum(device_bytes(config).values())
        buffers = sum(memory_by_purpose(config).values())
        return buffers + archive_memory(config, blocks, request.archive_limit)

    def fits(self, *videos: Video) -> bool:
        """Tell whether videos can be made at once."""
        return sum(map(self.video_bytes, videos)) <= self.available_bytes

    def check(self, video: Video) -> None:
        """Refuse a video that could not be made even alone.

        Raises:
            ConfigError: It takes more memory.
        """
        if not self.fits(video):
            place = "host memory" if self._on_host else "GPU memory"
            raise ConfigError(
                f"this video needs {format_gib(self.video_bytes(video), round_up=True)} GiB of "
                f"{place} and {format_gib(self.available_bytes)} GiB are there for videos: "
                f"shorten it or choose another policy than {video.request.policy}"
            )
