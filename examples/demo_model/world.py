"""The demo world: one turning, bouncing subject over a drifting two-tone ground.

Drawn with OpenCV, anti-aliased and sub-pixel, one clip per call and always the same for the
same generator state. The words are those of `packforcing.text`; nothing here needs torch.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from packforcing.text import COLOURS, GROUNDS, PATTERNS, SHAPES

SIZE = 128  # pixels, both ways
RADIUS = (20.0, 28.0)  # pixels; a subject covers about a tenth of the picture
SPEED = (1.2, 2.4)  # pixels per frame
TURN = 0.03  # radians per frame, at most
DRIFT = (0.2, 0.6)  # pixels per frame, the ground's
PERIOD = 32  # pixels; half a period is as wide as one latent cell, so a pattern survives

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
GROUND_RGB = {  # the ground's colour and its second tone
    "navy": ((18, 28, 84), (42, 58, 128)),
    "forest": ((20, 70, 34), (46, 106, 60)),
    "sand": ((200, 176, 128), (166, 140, 96)),
    "gray": ((116, 116, 120), (84, 84, 88)),
    "maroon": ((92, 18, 36), (130, 44, 62)),
    "teal": ((8, 100, 100), (30, 138, 136)),
}
_SHIFT = 6  # OpenCV's fractional bits


class Clip(NamedTuple):
    """A drawn clip. `frames` is uint8 [T, SIZE, SIZE, 3] in RGB; `masks` is uint8
    [T, SIZE, SIZE], 255 where the subject is."""

    prompt: str
    frames: np.ndarray
    masks: np.ndarray


def make_prompt(colour: str, shape: str, ground: str, pattern: str) -> str:
    """The sentence that names the four: "a red star over navy stripes"."""
    over = f"plain {ground}" if pattern == "plain" else f"{ground} {pattern}"
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {shape} over {over}"


def random_attributes(rng: np.random.Generator) -> dict[str, str]:
    """One word of each kind, all equally likely."""
    pools = {"colour": COLOURS, "shape": SHAPES, "ground": GROUNDS, "pattern": PATTERNS}
    return {name: str(pool[rng.integers(len(pool))]) for name, pool in pools.items()}


def make_clip(rng: np.random.Generator, frames: int, **fixed: str) -> Clip:
    """Draws a clip; attributes (colour, shape, ground, pattern) not given are drawn by lot."""
    words = {**random_attributes(rng), **fixed}
    radius = rng.uniform(*RADIUS)
    heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*SPEED)
    start = rng.uniform(radius, SIZE - radius, 2)
    velocity = speed * np.array([np.cos(heading), np.sin(heading)])
    times = np.arange(frames)[:, None]
    centres = _bounce(start + velocity * times, radius, SIZE - radius)
    angles = rng.uniform(0, 2 * np.pi) + rng.uniform(-TURN, TURN) * times[:, 0]

    drift = rng.uniform(*DRIFT) * rng.choice([-1, 1], 2)
    offsets = (rng.uniform(0, PERIOD, 2) + drift * times) % PERIOD
    tones = np.float32(GROUND_RGB[words["ground"]])
    share = _second_tone(words["pattern"])[..., None]
    tile = tones[0] * (1 - share) + tones[1] * share
    ink = np.float32(SUBJECT_RGB[words["colour"]])

    pictures = np.empty((frames, SIZE, SIZE, 3), np.uint8)
    masks = np.zeros((frames, SIZE, SIZE), np.uint8)
    for t in range(frames):
        middle = tuple(float(v) + (SIZE - 1) / 2 for v in offsets[t])
        ground = cv2.getRectSubPix(tile, (SIZE, SIZE), middle)
        _draw(masks[t], words["shape"], centres[t], radius, angles[t])
        cover = masks[t][..., None].astype(np.float32) / 255
        pictures[t] = np.rint(ground + cover * (ink - ground))
    return Clip(make_prompt(**words), pictures, masks)


def _bounce(position: np.ndarray, low: float, high: float) -> np.ndarray:
    """Folds a straight path into [low, high]."""
    span = high - low
    phase = np.mod(position - low, 2 * span)
    return low + np.minimum(phase, 2 * span - phase)


def _second_tone(pattern: str) -> np.ndarray:
    """Share of the second tone, float32 [SIZE + PERIOD, SIZE + PERIOD] in 0..1."""
    y, x = np.mgrid[: SIZE + PERIOD + 1, : SIZE + PERIOD + 1].astype(np.float32)

    def bars(u: np.ndarray) -> np.ndarray:  # signed distance to the nearest edge, in pixels
        return PERIOD / 4 - np.abs(np.mod(u, PERIOD) - PERIOD / 2)

    if pattern == "plain":
        return np.zeros_like(x)
    if pattern == "stripes":
        distance = bars(x)
    elif pattern == "checks":
        a, b = bars(x), bars(y)
        distance = np.minimum(np.abs(a), np.abs(b)) * np.sign(a) * np.sign(b)
    elif pattern == "dots":
        across = np.mod(x, PERIOD) - PERIOD / 2
        down = np.mod(y, PERIOD) - PERIOD / 2
        distance = PERIOD * 0.3 - np.hypot(across, down)
    else:
        raise ValueError(f"unknown pattern '{pattern}'; known: {', '.join(PATTERNS)}")
    return np.clip(distance + 0.5, 0, 1)


def _draw(mask: np.ndarray, shape: str, centre: np.ndarray, radius: float, angle: float) -> None:
    """Fills the shape with 255, anti-aliased."""
    if shape == "circle":
        corner = np.rint(centre * 2**_SHIFT).astype(int)
        size = round(radius * 2**_SHIFT)
        cv2.circle(mask, tuple(map(int, corner)), size, 255, -1, cv2.LINE_AA, _SHIFT)
        return
    count = {"square": 4, "triangle": 3, "star": 10}[shape]
    around = angle + 2 * np.pi * np.arange(count) / count
    reach = np.full(count, radius)
    if shape == "star":
        reach[1::2] *= 0.45
    points = centre + reach[:, None] * np.stack([np.cos(around), np.sin(around)], 1)
    points = np.rint(points * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, _SHIFT)
