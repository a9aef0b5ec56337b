"""Read a clip's frames as players show them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from packforcing.errors import VideoError
from packforcing.runtime.colors import HDR_NAMES
from packforcing.runtime.pictures import Shown

# No playlists and no patterns of names: they lead to other files, or into a network
OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,mxf,nut,ivf,rm,"
    "yuv4mpegpipe,h264,hevc,obu,av1,dv,wtv,swf",
}
_BT709, _UNTAGGED, _BT2020 = 1, 2, 9  # H.273 matrix coefficients
_MATRICES = (0, _BT709, _UNTAGGED, 4, 5, 6, 7, _BT2020)  # that swscale converts
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own ignore transparency


def read_clip(path: Path, notes: list[str]) -> Iterator[tuple[float | None, float, Any]]:
    """Yield start and duration in seconds and frame, in the order in which they are shown.

    Frames that an edit list hides are left out. Interlaced ones are deinterlaced.

    Args:
        path: The file.
        notes: Gets a line for what a user may not expect.

    Raises:
        VideoError: The file has no video.
        OSError, av.FFmpegError, ValueError: It cannot be decoded.
    """
    import av

    try:
        # absolute, as FFmpeg takes what is before a colon for a protocol
        container = av.open(path.absolute(), options=OPEN_OPTIONS)
    except (av.InvalidDataError, av.ArgumentError) as error:
        raise VideoError("it is damaged, or of no format that is read") from error
    with container:
        stream = _shown_stream(container)
        frames = _deinterlace(_decode(container, stream), stream, notes)
        for frame in frames:
            duration = (frame.duration or 0) * (frame.time_base or 0)
            # the container's aspect counts before the codec's
            yield frame.time, float(duration), (frame, stream.sample_aspect_ratio or 1)


def _shown_stream(container: Any) -> Any:
    """Return the video stream that players pick; covers of audio files are none."""
    import av

    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        covers = "audio and a cover picture" if container.streams.video else "no video"
        raise VideoError(f"it has {covers}" + ("" if container.streams.video else ", only audio"))
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def _decode(container: Any, stream: Any) -> Iterator[Any]:
    import av

    decoder = _ALPHA_DECODERS.get(stream.codec_context.name)
    if decoder is None or stream.metadata.get("alpha_mode") != "1":
        yield from container.decode(stream)
        return
    context = av.CodecContext.create(decoder, "r")
    assert isinstance(context, av.VideoCodecContext)
    for packet in container.demux(stream):
        for frame in context.decode(packet if packet.size else None):
            frame.time_base = stream.time_base
            yield frame


def _deinterlace(frames: Iterator[Any], stream: Any, notes: list[str]) -> Iterator[Any]:
    """Pass frames on; from the first interlaced one on through FFmpeg's bwdif."""
    import av

    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base or Fraction(1, 1000),
            )
            graph.link_nodes(
                source,
                graph.add("bwdif", "mode=send_frame:deint=interlaced"),
                graph.add("buffersink"),
            ).configure()
            notes.append("deinterlaced")
        if graph is None:
            yield frame
        else:
            graph.push(frame)
            yield from _pull(graph)
    if graph is not None:
        graph.push(None)
        yield from _pull(graph)


def _pull(graph: Any) -> Iterator[Any]:
    import av

    while True:
        try:
            yield graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return


def show_frame(frame: Any, pixel_aspect: Fraction, notes: list[str]) -> Shown:
    """Convert a decoded frame to RGB and turn it upright.

    Args:
        frame: Of PyAV.
        pixel_aspect: Width of a stored pixel over its height.
        notes: As for `read_clip`.

    Raises:
        VideoError: The frame is stored in a way that is not converted.
    """
    primaries, transfer = frame.color_primaries, frame.color_trc
    _tag_matrix(frame, transfer)
    has_alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
    if transfer in HDR_NAMES:
        note = f"HDR ({HDR_NAMES[transfer]}) tone-mapped to SDR by BT.2446 method A"
        if note not in notes:
            notes.append(note)
        pixels = frame.to_ndarray(format="rgb48le")
    elif has_alpha:
        layer = frame.to_ndarray(format="rgba").astype(np.uint16)
        pixels = ((layer[..., :3] * layer[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        pixels, pixel_aspect = _turn(pixels, Fraction(pixel_aspect), bytes(matrix))
    return Shown(pixels, Fraction(pixel_aspect), primaries, transfer)


def _tag_matrix(frame: Any, transfer: int) -> None:
    """Give an untagged frame the matrix that players assume: by transfer and size."""
    if frame.format.is_rgb or frame.format.has_palette:
        return
    if frame.colorspace not in _MATRICES:
        raise VideoError(f"its color matrix (H.273 number {frame.colorspace}) is not converted")
    if frame.colorspace == _UNTAGGED:
        if transfer in HDR_NAMES:
            frame.colorspace = _BT2020
        elif frame.width >= 1280 or frame.height > 576:
            frame.colorspace = _BT709


def _turn(pixels: np.ndarray, aspect: Fraction, matrix: bytes) -> tuple[np.ndarray, Fraction]:
    """Apply a display matrix of quarter turns and flips."""
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    if max(abs(b), abs(c)) * 50 < max(abs(a), abs(d)):  # a degree is what rounding may make
        across, down = a, d
    elif max(abs(a), abs(d)) * 50 < max(abs(b), abs(c)):
        pixels, aspect = pixels.swapaxes(0, 1), 1 / aspect
        across, down = c, b
    else:
        raise VideoError("it is turned by an angle that is no multiple of 90 degrees")
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1], aspect
