"""Read color, shape and ground back from frames of the demo world. NumPy and OpenCV, no model.

The world is drawn by `examples/demo_model/world.py`, with the palette of this file. A pixel
belongs to the nearest color of the palette (eight subjects, two tones of six grounds). The
ground is the majority's; the subject is the largest blob of one subject color, and its outline
tells the shape. `matches` states when a video counts as right, `returns` how well the places of a
tour look the same when the camera comes back to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from packforcing.extras import optional_imports
from packforcing.words import COLORS, GROUNDS, SHAPES

with optional_imports("reading the demo world's videos", "evaluate"):
    import cv2

SUBJECT_RGB = {
    "red": (232, 28, 36),
    "green": (40, 204, 52),
    "blue": (44, 92, 255),
    "yellow": (250, 226, 30),
    "purple": (168, 56, 224),
    "orange": (252, 128, 16),
    "white": (250, 250, 250),
    "cyan": (40, 222, 242),
}
GROUND_RGB = {  # the ground's color and its second tone
    "navy": ((18, 28, 84), (42, 58, 128)),
    "forest": ((20, 70, 34), (46, 106, 60)),
    "sand": ((200, 176, 128), (166, 140, 96)),
    "gray": ((116, 116, 120), (84, 84, 88)),
    "maroon": ((92, 18, 36), (130, 44, 62)),
    "teal": ((8, 100, 100), (30, 138, 136)),
}
MIN_AREA = 400  # pixels; the smallest subject drawn covers 630
FPS = 16
ELSEWHERE = 0.02  # share of the other place's ground up to which a frame shows one place alone
MOST = 0.4  # share of its own ground from which it is seen to be there: landmarks hide some
EDGE = 5  # pixels
STEADY = 0.75  # share of a visit's frames from which a pixel counts; the camera tilts
CONCAVE = 0.85  # of its convex hull: autoencoded stars fill up to 0.78, all else from 0.90 on
_SHIFT = 6  # OpenCV's fractional bits
STAY = 4  # frames; a halt is `world.HALT` long


def _ring(count: int, first: float) -> np.ndarray:
    """Points on the unit circle from an angle on, [count, 2]."""
    angles = first + 2 * np.pi * np.arange(count) / count
    return np.stack([np.cos(angles), np.sin(angles)], 1)


# corners [n, 2] of the upright shapes, for a radius of 1; y points down
SHAPE_OUTLINES = {
    "circle": _ring(64, 0),
    "square": _ring(4, np.pi / 4),
    "triangle": _ring(3, -np.pi / 2),
    "star": _ring(10, -np.pi / 2) * np.tile([1, 0.45], 5)[:, None],
}
_PALETTE = np.array(
    [SUBJECT_RGB[name] for name in COLORS]
    + [tone for name in GROUNDS for tone in GROUND_RGB[name]],
    np.float32,
)


def _nearest_table() -> np.ndarray:
    """Index of the nearest palette color for RGB in 32 levels each, uint8 [32, 32, 32]."""
    level = np.arange(4, 256, 8, dtype=np.float32)
    rgb = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1)
    return np.square(rgb[..., None, :] - _PALETTE).sum(-1).argmin(-1).astype(np.uint8)


_NEAREST = _nearest_table()


class Scene(NamedTuple):
    """What one frame shows; the first four are None where no subject is seen.

    Attributes:
        center: Of the subject, x and y in pixels.
        outline: Of the subject, int32 [points, 1, 2].
    """

    color: str | None
    shape: str | None
    center: tuple[float, float] | None
    outline: np.ndarray | None
    ground: str


def read_scene(frame: np.ndarray) -> Scene:
    """Read one frame.

    Args:
        frame: uint8 RGB [H, W, 3].
    """
    nearest = _nearest(frame)
    votes = np.bincount(nearest.ravel(), minlength=len(_PALETTE))
    ground = GROUNDS[int(votes[len(COLORS) :].reshape(-1, 2).sum(1).argmax())]
    best_area, color, best = float(MIN_AREA), None, None
    for index in np.flatnonzero(votes[: len(COLORS)] >= MIN_AREA):
        blob = cv2.morphologyEx(
            (nearest == index).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)
        )
        outlines, _ = cv2.findContours(blob, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        for outline in outlines:
            area = cv2.contourArea(outline)
            if area > best_area:
                best_area, color, best = area, COLORS[index], outline
    if best is None:
        return Scene(None, None, None, None, ground)
    moments = cv2.moments(best)
    center = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    return Scene(color, _shape(best), center, best, ground)


def _nearest(frame: np.ndarray) -> np.ndarray:
    """Index of each pixel's palette color, uint8 [H, W]."""
    return _NEAREST[tuple(np.moveaxis(frame >> 3, -1, 0))]


class Visit(NamedTuple):
    """The camera at one place of a tour, from frame `start` up to `stop`. `view` is int8 [H, W]:
    each pixel's ground by most frames' vote, -1 where the subject hid it all the time."""

    place: str
    start: int
    stop: int
    view: np.ndarray


def places(prompt: str) -> list[str]:
    """Return the grounds that a prompt names: two of a tour."""
    return [word for word in re.findall(r"\w+", prompt.lower()) if word in GROUNDS]


def visits(prompt: str, frames: Iterable[np.ndarray]) -> Iterator[Visit]:
    """Yield the stretches of `STAY` frames or more that show one place of a tour alone.

    A place is known by its ground. No frame stays in memory.

    Args:
        prompt: The prompt. Fewer than two grounds in it: not a tour, no visits.
        frames: Frames, uint8 RGB [H, W, 3].
    """
    tour = places(prompt)
    if len(tour) < 2:
        return
    here, start, count = None, 0, 0
    votes = np.zeros((len(GROUNDS), 0, 0), np.int32)
    for count, frame in enumerate(frames, 1):
        nearest = _nearest(frame).astype(np.int8)
        ground = np.where(nearest < len(COLORS), -1, (nearest - len(COLORS)) // 2)
        shares = np.array([(ground == GROUNDS.index(name)).mean() for name in tour])
        ranked = np.sort(shares)
        alone = ranked[-2] <= ELSEWHERE and ranked[-1] >= MOST
        now = tour[int(shares.argmax())] if alone else None
        if now != here:
            if here and count - 1 - start >= STAY:
                yield Visit(here, start, count - 1, _view(votes))
            here, start = now, count - 1
            votes = np.zeros((len(GROUNDS), *ground.shape), np.int32)
        if here:
            votes += ground == np.arange(len(GROUNDS))[:, None, None]
    if here and count - start >= STAY:
        yield Visit(here, start, count, _view(votes))


def _view(votes: np.ndarray) -> np.ndarray:
    steady = votes.max(0) > STEADY * votes.sum(0)
    return np.where(steady, votes.argmax(0), -1).astype(np.int8)


def view_error(before: Visit, after: Visit) -> float:
    """Return how differently two visits to one place look, 0 to 1.

    Of the pixels where either view shows a landmark (another ground than the place's own), the
    share where the views disagree. Pixels that the subject hid in one of them or that were not
    `STEADY` do not count, nor does what is thinner than `EDGE`: disagreements that a camera half a
    pixel off causes, and the rim of a subject that was not wholly hidden. A place without landmarks
    in both views scores 1: there is nothing to know it by.
    """
    own = GROUNDS.index(before.place)
    visible = (before.view >= 0) & (after.view >= 0)
    landmark = visible & ((before.view != own) | (after.view != own))
    wrong = landmark & (before.view != after.view)
    wrong, landmark = (
        cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((EDGE, EDGE), np.uint8))
        for mask in (wrong, landmark)
    )
    return float(wrong.sum() / landmark.sum()) if landmark.any() else 1.0


class Return(NamedTuple):
    """The camera back at a place, from another: at which frame, and its `view_error`."""

    place: str
    frame: int
    error: float


def returns(prompt: str, frames: Iterable[np.ndarray]) -> Iterator[Return]:
    """Yield every return to a place of a tour, against the first visit there, in order.

    Args:
        prompt: The prompt of a tour.
        frames: Its frames, uint8 RGB [H, W, 3].
    """
    first: dict[str, Visit] = {}
    here = None
    for visit in visits(prompt, frames):
        before = first.setdefault(visit.place, visit)
        if before is not visit and visit.place != here:
            yield Return(visit.place, visit.start, view_error(before, visit))
        here = visit.place


def loop_closure(prompt: str, frames: np.ndarray) -> list[float]:
    """Return the errors of `returns`."""
    return [visit.error for visit in returns(prompt, frames)]


def read_words(frames: np.ndarray) -> dict[str, list[str | None]]:
    """Read color, shape and ground of every frame.

    Args:
        frames: uint8 RGB [T, H, W, 3].

    Returns:
        A word per frame, or None where no subject is seen, by "color", "shape" and "ground".
    """
    scenes = [read_scene(frame) for frame in frames]
    return {
        "color": [scene.color for scene in scenes],
        "shape": [scene.shape for scene in scenes],
        "ground": [scene.ground for scene in scenes],
    }


def matches(
    prompt: str, frames: np.ndarray, words: dict[str, list[str | None]] | None = None
) -> dict[str, bool]:
    """Tell whether a video shows what its prompt names.

    A kind is right when at least half of all frames *and* at least half of the last second show
    the word of the prompt. Kinds that a prompt leaves out are right.

    Args:
        prompt: The prompt.
        frames: uint8 RGB [T, H, W, 3].
        words: What `read_words` read from the frames, to save the work.

    Returns:
        By "color", "shape", "ground" and "both", which is subject color and ground.
    """
    prompt_words = set(re.findall(r"\w+", prompt.lower()))
    words = read_words(frames) if words is None else words
    right = {}
    for kind, pool in (("color", COLORS), ("shape", SHAPES), ("ground", GROUNDS)):
        expected = prompt_words & set(pool)
        hits = np.array([not expected or word in expected for word in words[kind]])
        right[kind] = bool(hits.mean() >= 0.5 and hits[-FPS:].mean() >= 0.5)
    right["both"] = right["color"] and right["ground"]
    return right


def _shape(outline: np.ndarray) -> str:
    """A star is what fills little of its convex hull. Of the other shapes it is that which
    covers most of what the outline does and least beside it: by intersection over union with
    each, upright, of the same centroid and area."""
    if cv2.contourArea(outline) < CONCAVE * cv2.contourArea(cv2.convexHull(outline)):
        return "star"
    x, y, width, height = cv2.boundingRect(outline)
    margin = max(width, height)  # one of the same area may be wider
    mask = np.zeros((height + 2 * margin, width + 2 * margin), np.uint8)
    cv2.fillPoly(mask, [outline - (x - margin, y - margin)], 1)
    moments = cv2.moments(mask, binaryImage=True)
    area = moments["m00"]
    center = np.array([moments["m10"], moments["m01"]]) / area
    overlap = {}
    for name in ("circle", "square", "triangle"):
        points = SHAPE_OUTLINES[name]
        radius = np.sqrt(area / cv2.contourArea(points.astype(np.float32)))
        drawn = np.zeros_like(mask)
        corners = np.rint((center + radius * points) * 2**_SHIFT).astype(np.int32)
        cv2.fillPoly(drawn, [corners], 1, shift=_SHIFT)
        overlap[name] = np.count_nonzero(mask & drawn) / np.count_nonzero(mask | drawn)
    return max(overlap, key=lambda name: overlap[name])
