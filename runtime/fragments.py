"""Encode a video for viewers who come and go: H.264 as one fragment of MP4 per block.

A fragment begins with a keyframe and carries its time, so that a viewer may begin with any of them
and miss any of them. The header followed by fragments is a fragmented MP4 file.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from packforcing.files import flush
from packforcing.runtime.encoders import check_frames
from packforcing.runtime.video_forms import FORMS, encoder_options

_CONTAINER = {
    "movflags": "empty_moov+default_base_moof+frag_discont+skip_trailer",
    "avoid_negative_ts": "disabled",  # or a fragment's time would begin at 0
}


class FragmentEncoder:
    """Encodes the blocks of one video.

    Attributes:
        header: What every file or stream of the fragments begins with (ftyp and moov).
        mime: The type of the stream, as browsers' Media Source takes it.
    """

    def __init__(self, width: int, height: int, fps: int) -> None:
        """Open an encoder.

        Args:
            width: In pixels.
            height: In pixels.
            fps: Frames per second.
        """
        import av

        form = FORMS[".mp4"]
        # each frame is out before the next is in; keyframes are where blocks begin and nowhere else
        options = {**encoder_options(form), "tune": "zerolatency", "sc_threshold": "0"}
        self._shape, self._time_base, self._count = (height, width, 3), Fraction(1, fps), 0
        self._discarded = av.open(_Nowhere(), "w", format="mp4", options=_CONTAINER)
        stream = self._discarded.add_stream(form.codec, rate=fps, options=options)
        assert isinstance(stream, av.VideoStream)
        self._stream = stream
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = form.layout
        self._stream.codec_context.thread_count = 1  # cores are the graphs'
        self._discarded.start_encoding()
        self.header = self._mux([])
        profile = self.header[self.header.index(b"avcC") + 5 :][:3]  # with constraints and level
        self.mime = f'video/mp4; codecs="avc1.{profile.hex()}"'

    def encode(self, frames: np.ndarray, first_frame: int) -> bytes:
        """Encode a block.

        Args:
            frames: uint8 RGB [n, H, W, 3].
            first_frame: How many frames of the video come before it; above those of the block
                before.

        Returns:
            The fragment (moof and mdat).
        """
        import av

        check_frames(frames, self._shape)
        kinds, packets = av.video.frame.PictureType, []
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = first_frame + index, self._time_base
            frame.pict_type = kinds.NONE if index else kinds.I
            packets += self._stream.encode(frame)
        self._count += 1
        return self._mux(packets)[len(self.header) :]

    def close(self) -> None:
        """Free the encoder."""
        self._discarded.close()

    def _mux(self, packets: list[Any]) -> bytes:
        """Return a file with these packets as its only fragment."""
        import av

        options = {**_CONTAINER, "fragment_index": str(max(1, self._count))}
        file = io.BytesIO()
        with av.open(file, "w", format="mp4", options=options) as container:
            stream = container.add_stream_from_template(self._stream)
            container.start_encoding()
            for packet in packets:
                packet.stream = stream
                container.mux(packet)
        return file.getvalue()


class _Nowhere:
    """A file for a container that nobody reads."""

    def write(self, data: bytes) -> int:
        return len(data)


def join_fragments(source: Path, target: Path) -> None:
    """Copy a header and fragments into a plain MP4 that begins at 0 and plays while it loads.

    Args:
        source: The file, with a fragment at least.
        target: The new file, which is on the disk when this returns.

    Raises:
        OSError, av.FFmpegError: The disk refuses it.
    """
    import av

    options = dict(FORMS[".mp4"].container_options)
    # absolute, as FFmpeg takes what is before a colon for a protocol
    with (
        av.open(source.absolute()) as fragments,
        av.open(target.absolute(), "w", format="mp4", options=options) as video,
    ):
        read = fragments.streams.video[0]
        copy, first = video.add_stream_from_template(read), None
        for packet in fragments.demux(read):
            if packet.pts is None or packet.dts is None:  # the demuxer's end
                continue
            first = packet.dts if first is None else first
            packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, copy
            video.mux(packet)
    flush(target)
