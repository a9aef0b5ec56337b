"""The demo world: one bouncing subject over a drifting two-tone ground, or on a tour.

On a tour the camera pans between two places and back, again and again, and the subject travels
along. Each place has a ground of its own, which the prompt names, and a landmark, which it does
not: a sky in one of two colors, by lot, which can only be remembered.

Drawn with OpenCV, anti-aliased and sub-pixel, one clip per call and always the same for the
same generator state. The words are those of `packforcing.words`; nothing here needs torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from packforcing import model_config
from packforcing.config import TEMPORAL_FACTOR
from packforcing.evaluation.demo_judge import GROUND_RGB, SHAPE_OUTLINES, SUBJECT_RGB
from packforcing.words import (
    GROUNDS,
    KINDS,
    PATTERNS,
    PLACES,
    make_prompt,
    random_attributes,
    random_tour,
)

SIZE = 128  # pixels, both ways
RADIUS = (22.0, 28.0)  # pixels; a subject covers about a tenth of the picture
SPEED = (1.2, 2.4)  # pixels per frame
DRIFT = (0.2, 0.6)  # pixels per frame, the ground's
PERIOD = 32  # pixels; half a period is as wide as one token, so a pattern survives
PAN = 12  # frames from one place to the other
HALT = 28  # frames at each place, more than a window of the same memory as PackForcing's holds
SKY = 56  # pixels, of a landmark's height
TILT = 16  # pixels of it that the camera does not see at first
AWAY = 4  # frames
BLOCK = model_config("demo").block_pixel_frames  # prompts change between blocks
STAY = (1, 2, 3)  # blocks of a visit

_SHIFT = 6  # OpenCV's fractional bits


class Clip(NamedTuple):
    """A drawn clip. `frames` is uint8 [T, SIZE, SIZE, 3] in RGB; `masks` is uint8
    [T, SIZE, SIZE], 255 where the subject is; `camera` is float [T], pixels panned from the
    first place; `back` is bool [T, SIZE], the columns that `came_back`."""

    prompt: str
    frames: np.ndarray
    masks: np.ndarray
    camera: np.ndarray
    back: np.ndarray


class Visits(NamedTuple):
    """Drawn visits to places. `prompts` has one per block; `frames` and `masks` are those of a
    `Clip`."""

    prompts: list[str]
    frames: np.ndarray
    masks: np.ndarray


def make_clip(rng: np.random.Generator, frames: int, **fixed: str) -> Clip:
    """Draws a clip; attributes (color, shape, ground, pattern) not given are drawn by lot."""
    words = {**random_attributes(rng), **fixed}
    path = _subject_path(rng, frames)
    start, drift = _drift(rng)
    offsets = (start + drift * np.arange(frames)[:, None]) % PERIOD
    pictures, masks = _film(_tile(words), offsets, words, path)
    camera = np.zeros(frames)
    return Clip(make_prompt(**words), pictures, masks, camera, came_back(camera))


def make_tour(rng: np.random.Generator, frames: int, **fixed: str) -> Clip:
    """Draws a tour; attributes (color, shape, ground, beyond) not given are drawn by lot."""
    words = {**random_tour(rng), **fixed}
    path = _subject_path(rng, frames)
    names = [words["ground"], words["beyond"]]
    scene = np.concatenate([_place(name, rng.choice(skies(names)[name])) for name in names], 1)
    camera, tilt = _pan(rng, frames)
    offsets = np.stack([camera, tilt], 1)
    pictures, masks = _film(scene, offsets, words, path)
    return Clip(make_prompt(**words), pictures, masks, camera, came_back(camera))


def make_visits(rng: np.random.Generator, blocks: int) -> Visits:
    """Draws visits: the ground changes between blocks, at once, to that of another place.

    The prompt of the first visit names place, ground and pattern; when the subject comes back, the
    place alone. Some grounds have no place's name: they are passed through once.
    """
    words = random_attributes(rng)
    names = [str(name) for name in rng.permutation(PLACES)]
    prompts, known, last = list[str](), list[str](), None
    while len(prompts) < blocks:
        away = [name for name in known if name != last]
        kind = rng.choice(["new", "return", "unnamed"], p=[0.35, 0.5, 0.15])
        if away and (kind == "return" or len(known) == len(names)):
            last = str(rng.choice(away))
            prompt = make_prompt(words["color"], words["shape"], place=last)
        else:
            last = None if kind == "unnamed" else names[len(known)]
            known += [last] if last else []
            ground = {**random_attributes(rng), "color": words["color"], "shape": words["shape"]}
            prompt = make_prompt(**ground, place=last)
        prompts += [prompt] * min(int(rng.choice(STAY)), blocks - len(prompts))
    return Visits(prompts, *film_visits(rng, prompts))


def film_visits(rng: np.random.Generator, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Frames and masks of visits that follow a prompt per block."""
    path = _subject_path(rng, BLOCK * len(prompts))
    known: dict[str | None, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    pictures, masks, at = [], [], 0
    for prompt, visit in itertools.groupby(prompts):
        words = {kind: word for word in prompt.split() for kind in KINDS if word in KINDS[kind]}
        if "ground" in words:
            tile = _tile({"pattern": "plain", **words})
            known[words.get("place")] = tile, *_drift(rng)
        tile, start, drift = known[words.get("place")]
        stop = at + len(list(visit))
        times = np.arange(BLOCK * at, BLOCK * stop)
        offsets = (start + drift * times[:, None]) % PERIOD
        film = _film(tile, offsets, words, _Path(path.radius, path.centers[times]))
        pictures.append(film[0])
        masks.append(film[1])
        at = stop
    return np.concatenate(pictures), np.concatenate(masks)


def came_back(camera: np.ndarray) -> np.ndarray:
    """Columns of each frame, bool [T, SIZE], that were in view before and out of it within the
    last `AWAY` frames: what only memory can draw."""
    view = in_view(camera)
    left = np.logical_or.accumulate(view) & ~view
    lately = [left[max(t - AWAY, 0) : t].any(0) for t in range(len(view))]
    return on_screen(view & lately, camera)


def in_view(camera: np.ndarray) -> np.ndarray:
    """Which columns of the scene, bool [T, 2 * SIZE], are in view from the camera, [T] pixels."""
    columns = np.arange(2 * SIZE)
    return (columns >= camera[:, None]) & (columns <= camera[:, None] + SIZE - 1)


def on_screen(columns: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Columns of the scene [T, 2 * SIZE] to those of the frames [T, SIZE]."""
    first = np.ceil(camera).astype(int)[:, None]
    return np.take_along_axis(columns, first + np.arange(SIZE), 1)


class _Path(NamedTuple):
    """A subject's radius and centers [T, 2], in pixels."""

    radius: float
    centers: np.ndarray


def _subject_path(rng: np.random.Generator, frames: int) -> _Path:
    radius = rng.uniform(*RADIUS)
    heading, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*SPEED)
    start = rng.uniform(radius, SIZE - radius, 2)
    velocity = speed * np.array([np.cos(heading), np.sin(heading)])
    times = np.arange(frames)
    centers = _bounce(start + velocity * times[:, None], radius, SIZE - radius)
    return _Path(radius, centers)


def _film(
    scene: np.ndarray, offsets: np.ndarray, words: dict[str, str], path: _Path
) -> tuple[np.ndarray, np.ndarray]:
    """Frames and masks of the subject before a scene [H, W, 3], seen from offsets [T, 2] on."""
    ink = np.float32(SUBJECT_RGB[words["color"]])
    pictures = np.empty((len(offsets), SIZE, SIZE, 3), np.uint8)
    masks = np.zeros((len(offsets), SIZE, SIZE), np.uint8)
    for t, offset in enumerate(offsets):
        middle = tuple(float(v) + (SIZE - 1) / 2 for v in offset)
        ground = cv2.getRectSubPix(scene, (SIZE, SIZE), middle)
        _draw(masks[t], words["shape"], path.centers[t], path.radius)
        cover = masks[t][..., None].astype(np.float32) / 255
        pictures[t] = np.rint(ground + cover * (ink - ground))
    return pictures, masks


def _drift(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Where a ground begins and how far it moves per frame, [2] pixels each."""
    drift = rng.uniform(*DRIFT) * rng.choice([-1, 1], 2)
    return rng.uniform(0, PERIOD, 2), drift


def _tile(words: dict[str, str]) -> np.ndarray:
    """A ground, float32 [SIZE + PERIOD, SIZE + PERIOD, 3]."""
    tones = np.float32(GROUND_RGB[words["ground"]])
    share = _second_tone(words["pattern"])[..., None]
    return tones[0] * (1 - share) + tones[1] * share


def skies(names: list[str]) -> dict[str, list[str]]:
    """The two colors that the sky over either of two grounds may have: none has both's."""
    others = [ground for ground in GROUNDS if ground not in names]
    return dict(zip(sorted(names, key=GROUNDS.index), (others[:2], others[2:])))


def _place(ground: str, sky: str) -> np.ndarray:
    """A plain ground with a landmark, a sky of another ground's color, float32
    [SIZE + TILT, SIZE, 3]."""
    picture = np.full((SIZE + TILT, SIZE, 3), GROUND_RGB[ground][0], np.float32)
    picture[:SKY] = GROUND_RGB[sky][0]
    return picture


def _pan(rng: np.random.Generator, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the camera stands, [T] in 0..SIZE: halt, pan, halt, pan back; and how far it is tilted
    down, [T] in 0..TILT: it tilts up at every place, and pans when it sees all of the sky.

    So what is seen tells what comes, as a model that has to guess shows a bit of everything. It
    begins with 8 to 20 frames of a halt, in steps of a latent frame, at either place, so that 5
    seconds show a return.
    """
    left = TEMPORAL_FACTOR * rng.integers(2, 6)
    begin = rng.integers(2) * (HALT + PAN) + HALT - left
    phase = np.mod(begin + np.arange(frames), 2 * (HALT + PAN))
    there = np.clip(phase - HALT, 0, PAN)
    back = np.clip(phase - 2 * HALT - PAN, 0, PAN)
    tilt = np.interp(np.mod(phase, HALT + PAN), [0, HALT, HALT + PAN], [TILT, 0, TILT])
    return SIZE * (there - back) / PAN, tilt


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


def _draw(mask: np.ndarray, shape: str, center: np.ndarray, radius: float) -> None:
    """Fills the upright shape with 255, anti-aliased."""
    if shape == "circle":
        corner = np.rint(center * 2**_SHIFT).astype(int)
        size = round(radius * 2**_SHIFT)
        cv2.circle(mask, tuple(map(int, corner)), size, 255, -1, cv2.LINE_AA, _SHIFT)
        return
    points = center + radius * SHAPE_OUTLINES[shape]
    points = np.rint(points * 2**_SHIFT).astype(np.int32)
    cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, _SHIFT)
