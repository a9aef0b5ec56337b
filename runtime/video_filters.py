"""Change frames between the decoder and the file: more of them per second, and larger ones.

Both need no weights and see the frames in order, a few at a time. Nothing of a model is in what
they add: `docs/slow-gpus.md` has what is lost against frames that a model makes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from packforcing.runtime.arguments import check_integer

MAX_FACTOR = 4
_LOOKAHEAD = 2  # frames after one until libavfilter has given all that is before it
# overlapped blocks with adaptive weights, motion searched in both directions, in blocks of any size
_MOTION = "mi_mode=mci:mc_mode=aobmc:me_mode=bidir:vsbmc=1"


@dataclass(frozen=True)
class VideoFilters:
    """What happens to frames after the decoder; by default nothing.

    A video lasts as long as without filters.

    Attributes:
        scale: Factor of width and height. Lanczos, by libswscale.
        interpolate: Factor of the frame rate. Between two frames stand others along the motion, by
            libavfilter's `minterpolate`; it repeats a frame across a cut. The frames of the model
            stay what they are. After the last one, which nothing follows, it is repeated.
    """

    scale: int = 1
    interpolate: int = 1

    def __post_init__(self) -> None:
        for name in ("scale", "interpolate"):
            check_integer(name, getattr(self, name), 1, MAX_FACTOR, f"from 1 to {MAX_FACTOR}")

    def __bool__(self) -> bool:
        return self.scale > 1 or self.interpolate > 1

    def __str__(self) -> str:
        """Describe them in a line."""
        parts = {
            f"{self.interpolate} times the frames, interpolated": self.interpolate,
            f"scaled by {self.scale}": self.scale,
        }
        return ", ".join(text for text, factor in parts.items() if factor > 1)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height of the frames that come out."""
        return self.scale * width, self.scale * height

    def rate(self, frames: int) -> int:
        """Return how many frames come out for so many, or for so many per second."""
        return self.interpolate * frames

    def apply(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Filter a whole video, in order.

        Args:
            frames: Parts of it, uint8 RGB [n, H, W, 3].

        Yields:
            Frames, uint8 RGB [1, scale H, scale W, 3]; without filters the parts as they are.
        """
        if not self:
            yield from frames
            return
        single: Iterator[np.ndarray] = (frame for part in frames for frame in part)
        if self.interpolate > 1:
            single = _interpolate(single, self.interpolate)
        for frame in single:
            yield (_scale(frame, self.scale) if self.scale > 1 else frame)[None]


NO_FILTERS = VideoFilters()


def _scale(frame: np.ndarray, factor: int) -> np.ndarray:
    import av

    height, width, _ = frame.shape
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return picture.reformat(
        width=factor * width, height=factor * height, interpolation="LANCZOS"
    ).to_ndarray()


def _interpolate(frames: Iterable[np.ndarray], factor: int) -> Iterator[np.ndarray]:
    """Yield every frame, each followed by `factor` - 1 others."""
    graph: Any = None
    waiting: deque[np.ndarray] = deque()  # frames that are in the graph, or about to leave it
    count = 0
    last: np.ndarray = np.empty(0)
    for last in frames:
        graph = graph or _motion_graph(last.shape[0], last.shape[1], factor)
        waiting.append(last)
        _push(graph, last, count * factor)
        count += 1
        for place, between in _pull(graph):
            yield between if place % factor else waiting.popleft()
    if not count:
        return
    for number in range(_LOOKAHEAD):
        _push(graph, last, (count + number) * factor)
    graph.push(None)
    for place, between in _pull(graph):
        if place <= (count - 1) * factor:
            yield between if place % factor else waiting.popleft()
    for _ in range(factor - 1):
        yield last


def _motion_graph(height: int, width: int, factor: int) -> Any:
    """Return a filter for frames whose times are counted in frames that come out."""
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, factor)
    )
    steps = [
        source,
        graph.add("format", "pix_fmts=yuv444p"),
        graph.add("minterpolate", f"fps={factor}:{_MOTION}"),
        graph.add("format", "pix_fmts=rgb24"),
        graph.add("buffersink"),
    ]
    for before, after in pairwise(steps):
        before.link_to(after)
    graph.configure()
    return graph


def _push(graph: Any, frame: np.ndarray, place: int) -> None:
    import av

    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    picture.pts = place
    graph.push(picture)


def _pull(graph: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the frames that are ready, each with its place."""
    import av

    while True:
        try:
            frame = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield frame.pts, frame.to_ndarray()
