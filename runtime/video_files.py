"""Write frames to a video on disk, block by block.

The path says what is written: `.mp4` is H.264 for viewing, `.mkv` is FFV1 and keeps every
byte, a folder gets numbered PNG files. A video grows under a partial name beside its target
and takes the target's name when it is whole and on the disk, so whatever stands there can be
trusted. Frames for an empty folder grow in a partial folder inside, and move up when all are
there. `join_segments` makes such a video of segments that were written one by one, beside them, and
`place_video` gives it its name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from packforcing.errors import OutputError
from packforcing.files import flush, flush_folder, partial_path, require_disk_space

# Rough upper bounds on disk, in bytes per pixel. The lossless kinds exceed raw size on noise;
# H.264 at this quality stays well under two bits a pixel on anything but noise.
_BYTES_PER_PIXEL = {"mp4": 0.25, "mkv": 4.0, "png": 3.1}
_SPARE_BYTES = 1 << 20  # left free on the disk
JOINED = "joined"
_THREADS = 4  # of the encoder, whatever the machine has: x264 gives other bytes for another number
_GONE = "nothing is left of it"
_EARLIEST = 2  # places at most that x264's B-frames let a frame be decoded before it is shown

Kind = Literal["mp4", "mkv", "png"]


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
        kind, target = output_target(path)
        with suppress(FileNotFoundError, NotADirectoryError):
            target.stat()  # raises for a name that is too long, or out of reach
        if kind == "mp4" and (width % 2 or height % 2):
            raise OutputError(
                f"cannot write {target}: H.264 needs an even width and height, not "
                f"{width}x{height}; write .mkv or a folder of PNG files instead"
            )
        if kind == "png":
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
        needed = video_bytes(kind, frames, width, height)
        what = f"a video of {frames} frames"
        require_disk_space(folder, needed + _SPARE_BYTES, what, then)


def video_bytes(kind: Kind, frames: int, width: int, height: int) -> int:
    """Return a rough upper bound of the bytes that a video takes on disk."""
    return int(frames * width * height * _BYTES_PER_PIXEL[kind])


def _check_folder(target: Path) -> None:
    """Refuse what is in the way of a folder of PNG files."""
    if not target.is_dir():
        if os.path.lexists(target):
            raise OutputError(
                f"cannot write PNG files to {target}: a file has that name; "
                "name a folder, or a file ending in .mp4 or .mkv"
            )
    elif entry := next(target.iterdir(), None):
        raise OutputError(
            f"cannot write PNG files to {target}: the folder is not empty, it has {entry.name}; "
            "empty it or name a new one"
        )


@contextmanager
def open_video(
    path: str | os.PathLike[str], width: int, height: int, fps: int, then: str = _GONE
) -> Iterator[Video]:
    """Yield a video to write frames to; it gets its name when the block ends without error.

    Memory is that of one call to `write` and of the encoder's look-ahead. Any exception, an
    interrupt included, removes the partial file.

    Args:
        path: .mp4, .mkv or a folder for PNG files.
        width: In pixels.
        height: In pixels.
        fps: Frames per second.
        then: The end of an error's message: what remains and what to do.

    Raises:
        OutputError: The path cannot be written, at the start or on the way.
    """
    check_output(path, 0, width, height, then)
    kind, target = output_target(path)
    filling = target.is_dir()  # an empty folder; it stays, for it may be somebody's current one
    partial = partial_path(target / "frames" if filling else target)
    video: _PngFolder | _Encoder | None = None
    try:
        with output_errors(target, then):
            if kind == "png":
                video = _PngFolder(partial, width, height)
            else:
                video = _Encoder(partial, kind, width, height, fps)
        yield _Writer(video, target, then)
        with output_errors(target, then):
            video.finish()
            flush(partial)
            if filling:
                _move_up(partial)
            else:
                partial.replace(target)
            flush_folder(target if filling else target.parent)
    except BaseException:
        if video is not None:
            video.abandon()
        _remove(partial)
        raise


def join_segments(
    segments: Sequence[Path],
    path: str | os.PathLike[str],
    folder: Path,
    width: int,
    height: int,
    fps: int,
    then: str,
) -> Path:
    """Join segments in order, frame for frame and without encoding again.

    Args:
        segments: Videos that `open_video` wrote, of the kind that `segment_suffix` returns.
        path: The output.
        folder: On the same disk; the joined video lies there, as `JOINED` with its suffix.
        width: In pixels.
        height: In pixels.
        fps: Frames per second.
        then: The end of an error's message: what remains and what to do.

    Returns:
        The joined video, flushed to the disk; `place_video` is next.

    Raises:
        OutputError: The video cannot be written.
    """
    import av

    kind, target = output_target(path)
    partial = folder / (JOINED if kind == "png" else f"{JOINED}.{kind}")
    with output_errors(target, then):
        try:
            if kind == "png":
                _write_frames(segments, _PngFolder(partial, width, height))
            else:
                options = {"movflags": "+faststart"} if kind == "mp4" else {}
                with av.open(partial.absolute(), "w", options=options) as joined:
                    _copy_packets(segments, joined, fps, _EARLIEST if kind == "mp4" else 0)
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


def _write_frames(segments: Sequence[Path], folder: _PngFolder) -> None:
    import av

    for segment in segments:
        with av.open(segment.absolute()) as container:
            for frame in container.decode(video=0):
                folder.write(frame.to_ndarray(format="rgb24")[None])


def _copy_packets(segments: Sequence[Path], joined: Any, fps: int, earliest: int) -> None:
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
                packet.dts, packet.duration = count - earliest, 1
                packet.time_base, packet.stream = Fraction(1, fps), stream
                joined.mux(packet)
                count += 1


def segment_suffix(path: str | os.PathLike[str]) -> str:
    """Return the suffix of a video's segments: .mkv, lossless, for a folder of PNG files."""
    return ".mp4" if output_target(path)[0] == "mp4" else ".mkv"


class _Writer:
    """Writes frames to a video; raises `OutputError` where that fails."""

    def __init__(self, video: _Encoder | _PngFolder, target: Path, then: str) -> None:
        self._video, self._target, self._then = video, target, then

    def write(self, frames: np.ndarray) -> None:
        with output_errors(self._target, self._then):
            self._video.write(frames)


def _without_avx512() -> dict[str, str]:
    """Return the option that keeps x264 from AVX-512, on a CPU that has it.

    There x264's macroblock tree reads memory that it never wrote, so that the same frames give
    other bytes now and then. Its code for older CPUs gives the same bytes everywhere.
    """
    simd = (np.show_config(mode="dicts") or {}).get("SIMD Extensions", {})
    names = [*simd.get("baseline", ()), *simd.get("found", ())]
    avx512 = any(name.startswith("AVX512") or name == "X86_V4" for name in names)
    return {"x264-params": "asm=AVX2"} if avx512 else {}


class _Encoder:
    """One stream in one file, through PyAV."""

    def __init__(self, path: Path, kind: Kind, width: int, height: int, fps: int) -> None:
        import av

        self._shape = (height, width, 3)
        self._time_base, self._count = Fraction(1, fps), 0
        path = path.absolute()  # FFmpeg takes what is before a colon for a protocol
        if kind == "mp4":
            # the index moves to the front, so that a browser plays while it loads
            self._container = av.open(path, "w", options={"movflags": "+faststart"})
            codec, layout = "libx264", "yuv420p"
            options = {"crf": "16", "preset": "veryfast", **_without_avx512()}
            # what the conversion from RGB uses; untagged, players guess it from the height
            options |= {"colorspace": "smpte170m", "color_range": "tv"}
        else:
            self._container = av.open(path, "w")
            codec, layout, options = "ffv1", "bgr0", {"level": "3"}
        stream = self._container.add_stream(codec, rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = layout
        self._stream.codec_context.thread_count = _THREADS
        # opens the file; left to the first frame, PyAV would not close it again if that failed
        self._container.start_encoding()

    def write(self, frames: np.ndarray) -> None:
        import av

        _check_frames(frames, self._shape)
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = self._count, self._time_base
            self._count += 1
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        # closing writes the file's end, and the disk may refuse that as well
        with suppress(Exception):
            self._container.close()


class _PngFolder:
    """Numbered PNG files in a folder, through Pillow."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        self._path, self._shape = path, (height, width, 3)
        self._count = 0
        path.mkdir()

    def write(self, frames: np.ndarray) -> None:
        from PIL import Image

        _check_frames(frames, self._shape)
        for pixels in frames:
            path = self._path / f"frame_{self._count:06}.png"
            # zlib's fastest strategy: run lengths alone
            Image.fromarray(pixels).save(path, compress_level=1, compress_type=3)
            self._count += 1

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def output_target(path: str | os.PathLike[str]) -> tuple[Kind, Path]:
    """Return the kind of video that a path names, and the file or folder."""
    text = os.fspath(path)
    target = Path(text)
    if text.endswith(("/", os.sep)):
        return "png", target
    if target.name.lower() in (".mp4", ".mkv"):
        raise OutputError(
            f"cannot write {target}: that is a suffix without a name; name it 'video{target.name}'"
        )
    if not target.suffix:
        return "png", target
    if target.suffix.lower() == ".mp4":
        return "mp4", target
    if target.suffix.lower() == ".mkv":
        return "mkv", target
    if target.is_dir():
        return "png", target
    raise OutputError(
        f"cannot write {target}: '{target.suffix}' is not a kind of video written here; use .mp4, "
        ".mkv (lossless) or a folder for PNG files, such as 'frames/'"
    )


def _check_frames(frames: np.ndarray, shape: tuple[int, int, int]) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != shape:
        raise ValueError(
            f"frames must be uint8 [n, {', '.join(map(str, shape))}], "
            f"not {frames.dtype} {list(frames.shape)}"
        )


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
