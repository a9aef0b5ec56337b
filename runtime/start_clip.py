"""Read a picture or a clip to frames that a video begins with."""

from __future__ import annotations

import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from packforcing.config import Config
from packforcing.errors import ConfigError, VideoError
from packforcing.runtime.clips import read_clip, show_frame
from packforcing.runtime.colors import needs_conversion, to_sdr
from packforcing.runtime.pictures import Shown, read_picture

Fit = Literal["fill", "fit", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)
START_SECONDS = 2.0  # of a clip to start from; more would leave the model little to do
_LEAST_PIXELS = 1 << 14  # that a frame counts for, as decoding the smallest takes time too
_REMEDY = "give a picture (png, jpg, webp, avif, gif, tiff) or a short clip"
Item = TypeVar("Item")


@dataclass(frozen=True)
class StartClip:
    """Frames that a video begins with, and how they were made.

    Attributes:
        frames: uint8 RGB [T, height, width, 3].
        size: Width and height at which a player shows the file, in pixels.
        fit: How it was brought to the video's shape.
        change: What that did to it, in words.
        notes: What else was done to it, in words.
    """

    frames: np.ndarray
    size: tuple[int, int]
    fit: Fit
    change: str
    notes: list[str]

    def __str__(self) -> str:
        width, height = self.size
        details = "; ".join((f"{width}x{height}, {self.change}", *self.notes))
        return f"{len(self.frames)} frames ({details})"

    def record(self) -> dict[str, Any]:
        """Return all but the frames themselves, for JSON."""
        return {
            "frames": len(self.frames),
            "size": list(self.size),
            "fit": self.fit,
            "change": self.change,
            "notes": self.notes,
        }


def read_start(
    path: str | os.PathLike[str], width: int, height: int, fps: int, limit: int, fit: Fit = "fill"
) -> np.ndarray:
    """Return the frames of `load_start`, whose arguments it takes."""
    return load_start(path, width, height, fps, limit, fit).frames


def load_start(
    path: str | os.PathLike[str],
    width: int,
    height: int,
    fps: int,
    limit: int,
    fit: Fit = "fill",
    max_pixels: int | None = None,
) -> StartClip:
    """Read the frames that a video begins with, as players show them.

    A picture is one frame. A clip or an animation is read at `fps`; if it is longer than `limit`
    frames, its last ones count, since the video continues from its end. Frames are turned upright,
    their colors are those of an SDR display, and transparency is over black. They are resized with
    Pillow's bicubic filter, which averages where it shrinks.

    Args:
        path: The file.
        width: Of the video, in pixels.
        height: Of the video, in pixels.
        fps: Frames per second of the video.
        limit: Frames at most.
        fit: What becomes of another shape: "fill" crops around the center, "fit" adds black bars,
            "stretch" changes the aspect.
        max_pixels: Of all frames that are decoded, as a small file may hold very many; None: any.

    Raises:
        VideoError: The file cannot be read, or has more pixels.
        ConfigError: There is no such `fit`.
    """
    if fit not in FITS:
        raise ConfigError(f"a start fits by {', '.join(FITS)}, not '{fit}'")
    source = Path(path)
    notes: list[str] = []
    frames: deque[np.ndarray] = deque(maxlen=limit)
    size, change = (0, 0), ""
    try:
        for shown in _read(source, fps, limit, notes, max_pixels):
            size, change = _describe(shown, width, height, fit)
            frames.append(_fit(shown, width, height, fit))
    except VideoError as error:
        raise VideoError(f"cannot start from {source}: {error}; {_REMEDY}") from error
    except _decoder_errors() as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"cannot start from {source}: {reason}; {_REMEDY}") from error
    if not frames:
        raise VideoError(f"cannot start from {source}: no picture in it can be decoded; {_REMEDY}")
    return StartClip(np.stack(frames), size, fit, change, notes)


def load_video_start(
    path: str | os.PathLike[str],
    config: Config,
    fit: Fit = "fill",
    max_pixels: int | None = None,
) -> StartClip:
    """Read a picture, or the last `START_SECONDS` of a clip, as frames of whole blocks.

    Args:
        path: The file.
        config: Of the model that the video is made with.
        fit: As for `load_start`, as are `max_pixels` and the errors.
    """
    blocks = max(1, config.frames(START_SECONDS) // config.block_pixel_frames)
    limit = blocks * config.block_pixel_frames - config.trimmed_frames
    return load_start(path, config.width, config.height, config.fps, limit, fit, max_pixels)


def fit_frames(frames: np.ndarray, width: int, height: int, fit: Fit = "fill") -> np.ndarray:
    """Bring frames that a program has in memory to a video's size, as `load_start` does a file's.

    Args:
        frames: uint8 RGB [T, H, W, 3].
        width: Of the video, in pixels.
        height: Of the video, in pixels.
        fit: As for `load_start`.

    Returns:
        uint8 RGB [T, height, width, 3].
    """
    return np.stack([_fit(Shown(frame), width, height, fit) for frame in frames])


def _decoder_errors() -> tuple[type[Exception], ...]:
    import av
    from PIL import Image

    # Pillow raises the last four for damaged files
    bomb = Image.DecompressionBombError
    return OSError, av.FFmpegError, bomb, SyntaxError, ValueError, EOFError, struct.error


def _read(
    path: Path, fps: int, limit: int, notes: list[str], max_pixels: int | None
) -> Iterator[Shown]:
    pictures = read_picture(path, notes)
    if pictures is not None:
        bounded = _at_most(max_pixels, pictures, lambda shown: shown.pixels.size // 3)
        yield from _resample(bounded, fps, limit)
        return
    last, shown = None, None
    clip = _at_most(max_pixels, read_clip(path, notes), lambda item: item[0].width * item[0].height)
    for item in _resample(clip, fps, limit):
        if shown is None or item is not last:
            last, shown = item, show_frame(item[0], item[1], notes)
        yield shown


def _at_most(
    max_pixels: int | None,
    frames: Iterable[tuple[float | None, float, Item]],
    count_pixels: Callable[[Item], int],
) -> Iterator[tuple[float | None, float, Item]]:
    """Pass frames on, until together they have too many pixels."""
    pixels = 0
    for frame in frames:
        pixels += max(_LEAST_PIXELS, count_pixels(frame[2]))
        if max_pixels is not None and pixels > max_pixels:
            raise VideoError("it is too long: cut off what is before its end")
        yield frame


def _resample(
    frames: Iterable[tuple[float | None, float, Item]], fps: int, limit: int
) -> Iterator[Item]:
    """Yield for each frame of the video the first that begins in its time, or the one before.

    Args:
        frames: Start and duration in seconds, and the frame.
        fps: Frames per second of the video.
        limit: A frame is repeated no more often, as only the end counts.
    """
    count, origin, end = 0, None, 0.0
    newest: Any = None
    for start, duration, frame in frames:
        time = count / fps if start is None else start
        origin = time if origin is None else origin
        # a quarter of a frame early still counts: containers round times to milliseconds
        slot = math.floor((time - origin) * fps + 0.25)
        for _ in range(min(slot - count, limit)):
            yield newest
        if slot >= count:
            yield frame
        count, newest = max(count, slot + 1), frame
        end = time - origin + duration
    for _ in range(min(math.floor(end * fps + 0.25) - count, limit)):
        yield newest


def _part(shown: Shown, width: int, height: int) -> tuple[int, int]:
    """Return columns and rows of the largest part that has the video's shape."""
    rows, columns = shown.pixels.shape[:2]
    aspect = Fraction(width, height) / shown.pixel_aspect
    if columns > rows * aspect:
        return max(1, round(rows * aspect)), rows
    return columns, max(1, round(columns / aspect))


def _inset(shown: Shown, width: int, height: int) -> tuple[int, int]:
    """Return width and height, in pixels of the video, at which all of a picture is seen."""
    rows, columns = shown.pixels.shape[:2]
    aspect = Fraction(columns, rows) * shown.pixel_aspect
    if aspect > Fraction(width, height):
        return width, max(1, round(width / aspect))
    return max(1, round(height * aspect)), height


def _fit(shown: Shown, width: int, height: int, fit: Fit) -> np.ndarray:
    """Return a picture in the video's shape, size and colors."""
    pixels, size = shown.pixels, (width, height)
    rows, columns = pixels.shape[:2]
    if fit == "fill":
        part_columns, part_rows = _part(shown, width, height)
        top, left = (rows - part_rows) // 2, (columns - part_columns) // 2
        pixels = pixels[top : top + part_rows, left : left + part_columns]
    elif fit == "fit":
        size = _inset(shown, width, height)
    resized = _resize(pixels, *size)
    if needs_conversion(shown.primaries, shown.transfer):
        resized = to_sdr(resized, shown.primaries, shown.transfer)
    if size == (width, height):
        return resized
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    frame = np.zeros((height, width, 3), np.uint8)
    frame[top : top + size[1], left : left + size[0]] = resized
    return frame


def _resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    from PIL import Image

    filter_ = Image.Resampling.BICUBIC
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize((width, height), filter_))
    channels = [  # Pillow has no RGB of 16 bits
        np.asarray(Image.fromarray(channel.astype(np.float32)).resize((width, height), filter_))
        for channel in np.moveaxis(pixels, -1, 0)
    ]
    return np.clip(np.stack(channels, -1) + 0.5, 0, 65535).astype(np.uint16)


def _describe(shown: Shown, width: int, height: int, fit: Fit) -> tuple[tuple[int, int], str]:
    """Return the size at which a picture is shown, and what fitting does to it."""
    rows, columns = shown.pixels.shape[:2]
    aspect = shown.pixel_aspect
    size = max(1, round(columns * aspect)), rows
    part = _part(shown, width, height)
    if part == (columns, rows):
        return size, "whole"
    if fit == "fill":
        return size, f"cropped to {max(1, round(part[0] * aspect))}x{part[1]}"
    if fit == "fit":
        inset = _inset(shown, width, height)
        if inset[0] < width:
            return size, f"bars of {width - inset[0]} columns in all at the left and right"
        return size, f"bars of {height - inset[1]} rows in all at the top and bottom"
    stretch = float(Fraction(width, height) / (Fraction(columns, rows) * aspect))
    return size, f"stretched by {stretch:.2f} in width over height"
