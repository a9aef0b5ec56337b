"""Read videos frame by frame, to measure them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from packforcing.errors import VideoError

SHORT_SIDE = (32, 480)  # pixels: below, flow finds nothing; above, frames are measured smaller


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames of a video file.

    Args:
        path: The file.

    Returns:
        Frames, uint8 RGB [H, W, 3], in order. Larger ones are reduced to a short side of 480
        pixels.

    Raises:
        VideoError: The file is damaged.
    """
    count = 0
    try:
        with av.open(path.absolute()) as container:  # no protocol before a colon in it
            stream = container.streams.video[0]
            shrink = min(1.0, SHORT_SIDE[1] / min(stream.width, stream.height))
            width, height = round(stream.width * shrink), round(stream.height * shrink)
            for frame in container.decode(stream):
                yield frame.to_ndarray(format="rgb24", width=width, height=height)
                count += 1
    except (OSError, av.FFmpegError) as error:
        raise VideoError(f"{path} is damaged after {count} frames: {error.strerror}") from error


def probe_video(path: Path) -> tuple[float, int, tuple[int, int]]:
    """Read the header of a video file.

    Args:
        path: The file.

    Returns:
        Frames per second; the number of frames, 0 where the file does not state it; width and
        height in pixels.

    Raises:
        VideoError: The file is missing, no video, or too small to measure.
    """
    try:
        with path.open("rb"):
            pass  # gives a plainer reason than the decoders do
        with av.open(path.absolute()) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video; name a file that does, like .mp4")
            stream = container.streams.video[0]
            rate, size = stream.average_rate, (stream.width, stream.height)
            count = stream.frames or int((container.duration or 0) / 1e6 * float(rate or 0))
    except (OSError, av.FFmpegError) as error:
        raise VideoError(
            f"cannot read {path}: {error.strerror}; name a video file, like .mp4 or .mkv"
        ) from error
    if not rate:
        raise VideoError(f"{path} does not state its frames per second")
    if min(size) < SHORT_SIDE[0]:
        raise VideoError(
            f"{path} is {size[0]}x{size[1]}: too small to measure, {SHORT_SIDE[0]} pixels at least"
        )
    return float(rate), count, size
