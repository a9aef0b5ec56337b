"""Encode frames into one file, a folder of PNG files or a stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from packforcing.runtime.video_forms import PNG, Form, encoder_options

COMMENT = "comment"  # FFmpeg's name of what a file says about itself
PNG_COMMENT = "Comment"  # the PNG specification's
_THREADS = 4  # of the encoder, whatever the machine has: x264 gives other bytes for another number


class Encoder(Protocol):
    """Takes uint8 RGB frames [n, H, W, 3]."""

    def write(self, frames: np.ndarray) -> None:
        """Append frames."""

    def finish(self) -> None:
        """Write what is left, and the end of the file."""

    def abandon(self) -> None:
        """Close the file, whose contents do not matter any more."""


def open_encoder(
    output: Path | BinaryIO, form: Form, width: int, height: int, fps: int, comment: str = ""
) -> Encoder:
    """Begin a video.

    Args:
        output: A new file or folder, or an open stream.
        form: How it is written.
        width: In pixels.
        height: In pixels.
        fps: Frames per second.
        comment: What the file says about itself (`packforcing.runtime.metadata`).
    """
    if form is PNG:
        assert isinstance(output, Path)
        return PngFolder(output, width, height, comment)
    return _FileEncoder(output, form, width, height, fps, comment)


class _FileEncoder:
    """One video in one file, through PyAV."""

    def __init__(
        self,
        output: Path | BinaryIO,
        form: Form,
        width: int,
        height: int,
        fps: int,
        comment: str,
    ) -> None:
        import av

        self._shape = (height, width, 3)
        self._time_base, self._count = Fraction(1, fps), 0
        # absolute, as FFmpeg takes what is before a colon for a protocol
        file = output.absolute() if isinstance(output, Path) else output
        self._container = av.open(
            file, "w", format=form.container, options=dict(form.container_options)
        )
        add_comment(self._container, comment)
        stream = self._container.add_stream(form.codec, rate=fps, options=encoder_options(form))
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = form.layout
        self._stream.codec_context.thread_count = _THREADS
        self._palette = _palette_graph(width, height, fps) if form.layout == "pal8" else None
        # opens the file; left to the first frame, PyAV would not close it again if that failed
        self._container.start_encoding()

    def write(self, frames: np.ndarray) -> None:
        import av

        check_frames(frames, self._shape)
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = self._count, self._time_base
            self._count += 1
            for ready in self._reduce_colors(frame):
                self._container.mux(self._stream.encode(ready))

    def _reduce_colors(self, frame: Any) -> Iterator[Any]:
        if self._palette is None:
            yield frame
            return
        self._palette.push(frame)
        reduced = self._palette.pull()
        reduced.pts, reduced.time_base = frame.pts, self._time_base
        yield reduced

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        # closing writes the file's end, and the disk may refuse that as well
        with suppress(Exception):
            self._container.close()


def add_comment(container: Any, comment: str) -> None:
    """Let a file that is not begun yet say something about itself."""
    if comment:
        container.metadata[COMMENT] = comment


def _palette_graph(width: int, height: int, fps: int) -> Any:
    """Return a filter that gives each frame the 256 colors that suit it."""
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, fps)
    )
    split = graph.add("split")
    colors = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    used = graph.add("paletteuse", "new=1:dither=sierra2_4a")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(used, 0, 0)
    split.link_to(colors, 1, 0)
    colors.link_to(used, 0, 1)
    used.link_to(sink)
    graph.configure()
    return graph


def frame_file(number: int) -> str:
    """Return the name of a frame in a folder of PNG files."""
    return f"frame_{number:06}.png"


class PngFolder:
    """Numbered PNG files in a folder, through Pillow."""

    def __init__(self, path: Path, width: int, height: int, comment: str) -> None:
        self._path, self._shape = path, (height, width, 3)
        self._comment = comment
        self._count = 0
        path.mkdir()

    def write(self, frames: np.ndarray) -> None:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        check_frames(frames, self._shape)
        for pixels in frames:
            entries = PngInfo()
            if self._comment and not self._count:
                entries.add_text(PNG_COMMENT, self._comment)
            path = self._path / frame_file(self._count)
            # zlib's fastest strategy: run lengths alone
            Image.fromarray(pixels).save(path, pnginfo=entries, compress_level=1, compress_type=3)
            self._count += 1

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def check_frames(frames: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Raise `ValueError` unless frames are uint8 [n, *shape]."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != shape:
        raise ValueError(
            f"frames must be uint8 [n, {', '.join(map(str, shape))}], "
            f"not {frames.dtype} {list(frames.shape)}"
        )
