"""Read a picture or a clip to frames that a video begins with."""

from __future__ import annotations

import itertools
import math
import os
import struct
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from packforcing.errors import VideoError

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "AVIF")  # that Pillow may try; no other decoder runs
_REMEDY = "give a picture (png, jpg, webp, avif) or a short clip"


def read_start(
    path: str | os.PathLike[str], width: int, height: int, fps: int, limit: int
) -> np.ndarray:
    """Read the frames that a video begins with.

    A picture is one frame. It is shown as players show it: turned as its EXIF orientation says,
    transparent parts over black, 16 bits per channel scaled to 8, CMYK converted to RGB. A clip is
    read at `fps`; if it is longer than `limit` frames, its last ones count, since the video
    continues from its end. Both are cropped around the center to the shape of the video, then
    resized with Pillow's bicubic filter, which averages where it shrinks.

    Args:
        path: The file.
        width: Of the video, in pixels.
        height: Of the video, in pixels.
        fps: Frames per second of the video.
        limit: Frames at most.

    Returns:
        uint8 RGB [T, height, width, 3], with 1 <= T <= limit.

    Raises:
        VideoError: The file cannot be read.
    """
    source = Path(path)
    frames: deque[np.ndarray] = deque(maxlen=limit)
    try:
        with source.open("rb"):
            pass  # gives a plainer reason than the decoders do
        is_picture = source.suffix.lower() in PICTURE_SUFFIXES
        for image in _read_picture(source) if is_picture else _read_clip(source, fps, limit):
            frames.append(_fit(image, width, height))
    except _decoder_errors() as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"cannot start from {source}: {reason}; {_REMEDY}") from error
    if not frames:
        raise VideoError(f"cannot start from {source}: no picture in it can be decoded; {_REMEDY}")
    return np.stack(frames)


def _decoder_errors() -> tuple[type[Exception], ...]:
    import av
    from PIL import Image

    # Pillow raises the last four for damaged files
    bomb = Image.DecompressionBombError
    return OSError, av.FFmpegError, bomb, SyntaxError, ValueError, EOFError, struct.error


def _read_picture(path: Path) -> Iterator[Image.Image]:
    """Read a picture as RGB; nothing if it is of no format that is read."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(path, formats=_FORMATS)
    except UnidentifiedImageError:  # its text has no reason
        return
    with image:
        turned = ImageOps.exif_transpose(image)
        if turned.mode.startswith("I"):  # gray, 16 bits
            gray = np.asarray(turned).astype(np.uint32)
            turned = Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8))
        if turned.has_transparency_data:
            layer = turned.convert("RGBA")
            turned = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
        yield turned.convert("RGB")


def _read_clip(path: Path, fps: int, limit: int) -> Iterator[Image.Image]:
    """Read a clip's frames at `fps` as RGB: each the first that is due."""
    import av
    from PIL import Image

    with av.open(path.absolute()) as container:  # no protocol before a colon in it
        count, start = 0, None
        for frame in container.decode(video=0) if container.streams.video else ():
            time = count / fps if frame.time is None else frame.time
            start = time if start is None else start
            # a quarter of a frame early still counts: containers round times to milliseconds
            due = math.floor((time - start) * fps + 0.25) + 1 - count
            if due > 0:
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                # a gap in the clip repeats a frame, but no more often than can be of use
                yield from itertools.repeat(image, min(due, limit))
                count += due


def _fit(image: Image.Image, width: int, height: int) -> np.ndarray:
    """Return the largest centered part that has the video's shape, in its size."""
    from PIL import Image

    columns, rows = image.size
    if columns * height > rows * width:
        part_rows, part_columns = rows, max(1, round(rows * width / height))
    else:
        part_rows, part_columns = max(1, round(columns * height / width)), columns
    top, left = (rows - part_rows) // 2, (columns - part_columns) // 2
    part = image.crop((left, top, left + part_columns, top + part_rows))
    return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))
