"""Write frames to a video on disk, block by block.

The path says what is written (`packforcing.runtime.video_forms` has the table). A video grows under
a partial name beside its target and takes the target's name when it is whole and on the disk, so
whatever stands there can be trusted. Frames for an empty folder grow in a partial folder inside,
and move up when all are there. `join_segments` makes such a video of segments that were written one
by one, beside them, and `place_video` gives it its name.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from packforcing.errors import OutputError
from packforcing.files import flush, flush_folder, partial_path, require_disk_space
from packforcing.runtime.encoders import Encoder, add_comment, open_encoder
from packforcing.runtime.video_filters import NO_FILTERS, VideoFilters
from packforcing.runtime.video_forms import PNG, STREAM, Form, output_target

_SPARE_BYTES = 1 << 20  # left free on the disk
JOINED = "joined"
_GONE = "nothing is left of it"


class Video(Protocol):
    """What `open_video` yields."""

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 RGB frames [n, H, W, 3]; raise `OutputError` if the disk refuses."""


def check_output(
    path: str | os.PathLike[str],
    frames: int,
    width: int,
    height: int,
    then: str = "free some space or choose another folder",
) -> None:
    """Check that a video can be written, before anything is computed.

    Args:
        path: The output.
        frames: Frames of the video.
        width: In pixels.
        height: In pixels.
        then: What to do where the disk has too little room, the end of that message.

    Raises:
        OutputError: The suffix is unknown, the system refuses the name, the folder is missing or
            not writable, the target is in the way, or the disk has too little room.
    """
    with output_errors(path, "choose another name or folder"):
        form, target = output_target(path)
        if form.layout == "yuv420p" and form.codec == "libx264" and (width % 2 or height % 2):
            raise OutputError(
                f"cannot write {target}: H.264 needs an even width and height, not "
                f"{width}x{height}; write .mkv, .webm, .gif or a folder of PNG files instead"
            )
        if form is STREAM:
            _standard_output().close()
            return
        with suppress(FileNotFoundError, NotADirectoryError):
            target.stat()  # raises for a name that is too long, or out of reach
        if form is PNG:
            _check_folder(target)
        elif target.is_dir():
            raise OutputError(f"cannot write {target}: a folder has that name; choose another name")
        folder = target if target.is_dir() else target.parent
        if not folder.is_dir():
            raise OutputError(
                f"cannot write {target}: there is no folder {folder}; create it first"
            )
        try:
            # permission bits would overlook a read-only disk and mislead an administrator
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OutputError(
                f"cannot write {target}: the folder {folder} is not writable ({_why(error)}); "
                "choose another"
            ) from error
        needed = video_bytes(form, frames, width, height)
        what = f"a video of {frames} frames"
        require_disk_space(folder, needed + _SPARE_BYTES, what, then)


def video_bytes(form: Form, frames: int, width: int, height: int) -> int:
    """Return a rough upper bound of the bytes that a video takes on disk."""
    return int(frames * width * height * form.bytes_per_pixel)


def _check_folder(target: Path) -> None:
    """Refuse what is in the way of a folder of PNG files."""
    if not target.is_dir():
        if os.path.lexists(target):
            raise OutputError(
                f"cannot write PNG files to {target}: a file has that name; "
                "name a folder, or a file ending in .mp4, .mov, .webm, .gif or .mkv"
            )
    elif entry := next(target.iterdir(), None):
        raise OutputError(
            f"cannot write PNG files to {target}: the folder is not empty, it has {entry.name}; "
            "empty it or name a new one"
        )


@contextmanager
def open_video(
    path: str | os.PathLike[str],
    width: int,
    height: int,
    fps: int,
    then: str = _GONE,
    comment: str = "",
) -> Iterator[Video]:
    """Yield a video to write frames to; it gets its name when the block ends without error.

    Memory is that of one call to `write` and of the encoder's look-ahead. Any exception, an
    interrupt included, removes the partial file. On standard output frames arrive as they are
    written.

    Args:
        path: Of one of the forms.
        width: In pixels.
        height: In pixels.
        fps: Frames per second.
        then: The end of an error's message: what remains and what to do.
        comment: What the file says about itself.

    Raises:
        OutputError: The path cannot be written, at the start or on the way.
    """
    check_output(path, 0, width, height, then)
    form, target = output_target(path)
    filling = target.is_dir()  # an empty folder; it stays, for it may be somebody's current one
    partial = partial_path(target / "frames" if filling else target)
    video: Encoder | None = None
    output: Path | BinaryIO = partial
    try:
        with output_errors(target, then):
            output = _standard_output() if form is STREAM else partial
            video = open_encoder(output, form, width, height, fps, comment)
        yield _Writer(video, target, then)
        with output_errors(target, then):
            video.finish()
            if isinstance(output, Path):
                _place(partial, target, filling)
    except BaseException:
        if video is not None:
            video.abandon()
        _remove(partial)
        raise
    finally:
        if not isinstance(output, Path):
            with suppress(OSError):
                output.close()


def _place(partial: Path, target: Path, filling: bool) -> None:
    flush(partial)
    if filling:
        _move_up(partial)
    else:
        partial.replace(target)
    flush_folder(target if filling else target.parent)


def _standard_output() -> BinaryIO:
    """Return another descriptor of standard output, so that nothing is between it and a video."""
    try:
        sys.stdout.flush()
        descriptor = sys.stdout.fileno()
    except (AttributeError, ValueError, OSError):
        raise OutputError("cannot write a video to standard output: it is closed") from None
    if os.isatty(descriptor):
        raise OutputError(
            "cannot write a video to a terminal; pipe it, as in 'packforcing render ... --out - | "
            "ffplay -', or name a file"
        )
    return os.fdopen(os.dup(descriptor), "wb", buffering=0)


def join_segments(
    segments: Sequence[Path],
    path: str | os.PathLike[str],
    folder: Path,
    width: int,
    height: int,
    fps: int,
    then: str,
    comment: str = "",
    filters: VideoFilters = NO_FILTERS,
) -> Path:
    """Join segments in order, frame for frame; lossless ones are encoded, others copied.

    Args:
        segments: Videos that `open_video` wrote, of the kind that `segment_suffix` returns.
        path: The output.
        folder: On the same disk; the joined video lies there, as `JOINED` with its suffix.
        width: Of the segments, in pixels.
        height: Of the segments, in pixels.
        fps: Of the segments.
        then: The end of an error's message: what remains and what to do.
        comment: What the file says about itself.
        filters: What happens to lossless segments.

    Returns:
        The joined video, flushed to the disk; `place_video` is next.

    Raises:
        OutputError: The video cannot be written.
    """
    import av

    form, target = output_target(path)
    partial = folder / f"{JOINED}{form.suffix}"
    with output_errors(target, then):
        try:
            if filters or form.segment != form.suffix:
                size, rate = filters.size(width, height), filters.rate(fps)
                encoder = open_encoder(partial, form, *size, rate, comment)
                _write_frames(segments, encoder, filters)
            else:
                options = dict(form.container_options)
                with av.open(
                    partial.absolute(), "w", format=form.container, options=options
                ) as joined:
                    add_comment(joined, comment)
                    _copy_packets(segments, joined, fps, form.reordered)
            flush(partial)
        except BaseException:
            _remove(partial)
            raise
    return partial


def place_video(video: Path, target: Path) -> None:
    """Rename a video, or a folder of frames, to `target`, where an empty folder may be."""
    if target.is_dir():
        target.rmdir()
    video.replace(target)
    flush_folder(target.parent)


def _write_frames(segments: Sequence[Path], video: Encoder, filters: VideoFilters) -> None:
    try:
        for frames in filters.apply(_read_frames(segments)):
            video.write(frames)
        video.finish()
    except BaseException:
        video.abandon()
        raise


def _read_frames(segments: Sequence[Path]) -> Iterator[np.ndarray]:
    import av

    for segment in segments:
        with av.open(segment.absolute()) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")[None]


def _copy_packets(segments: Sequence[Path], joined: Any, fps: int, reordered: int) -> None:
    """Copy each frame as it was encoded to its place in the whole video."""
    import av

    stream, count, headers = None, 0, None
    for segment in segments:
        with av.open(segment.absolute()) as container:
            source = container.streams.video[0]
            stream = stream or joined.add_stream_from_template(source)
            headers = headers or source.codec_context.extradata
            if source.codec_context.extradata != headers:
                raise OutputError(f"cannot join {segment} to those before: it is encoded otherwise")
            first = count
            for packet in container.demux(source):
                if packet.pts is None or packet.time_base is None:  # the demuxer's end
                    continue
                packet.pts = first + round(packet.pts * packet.time_base * fps)
                packet.dts, packet.duration = count - reordered, 1
                packet.time_base, packet.stream = Fraction(1, fps), stream
                joined.mux(packet)
                count += 1


class _Writer:
    """Writes frames to a video; raises `OutputError` where that fails."""

    def __init__(self, video: Encoder, target: Path, then: str) -> None:
        self._video, self._target, self._then = video, target, then

    def write(self, frames: np.ndarray) -> None:
        with output_errors(self._target, self._then):
            self._video.write(frames)


@contextmanager
def output_errors(target: str | os.PathLike[str], then: str) -> Iterator[None]:
    """Turn what the disk or the encoder raises into an `OutputError` that ends in `then`."""
    try:
        yield
    except _failures() as error:
        raise OutputError(f"cannot write {target}: {_why(error)}; {then}") from error


def _failures() -> tuple[type[Exception], ...]:
    import av

    return OSError, av.FFmpegError


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _move_up(partial: Path) -> None:
    """Move a folder's files into its parent, all or none, and remove it."""
    moved: list[Path] = []
    try:
        for file in sorted(partial.iterdir()):
            moved.append(file.rename(partial.parent / file.name))
        partial.rmdir()
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        with suppress(OSError):
            partial.unlink()
