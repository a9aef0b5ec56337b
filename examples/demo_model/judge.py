"""Reads colours and shape back from frames of the demo world. Numpy and OpenCV, no model.

A pixel belongs to the nearest colour of the palette (eight subjects, two tones of six grounds).
The ground is the majority's; the subject is the largest blob of one subject colour, and its
outline tells the shape. `matches` states when a video counts as right, `loop_closure` how well
the places of a tour look the same when the camera comes back to them.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import NamedTuple

import cv2
import numpy as np
from world import GROUND_RGB, SUBJECT_RGB

from packforcing.text import COLOURS, GROUNDS, SHAPES

MIN_AREA = 350  # pixels; the smallest subject drawn covers 480
FPS = 16
ELSEWHERE = 0.02  # share of the other place's ground up to which a frame shows one place alone
MOST = 0.4  # share of its own ground from which it is seen to be there: landmarks hide some
EDGE = 5  # pixels
STAY = 4  # frames; a halt is `world.HALT` long
_PALETTE = np.float32(
    [SUBJECT_RGB[name] for name in COLOURS]
    + [tone for name in GROUNDS for tone in GROUND_RGB[name]]
)


def _nearest_table() -> np.ndarray:
    """Index of the nearest palette colour for RGB in 32 levels each, uint8 [32, 32, 32]."""
    level = np.arange(4, 256, 8, dtype=np.float32)
    rgb = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1)
    return np.square(rgb[..., None, :] - _PALETTE).sum(-1).argmin(-1).astype(np.uint8)


_NEAREST = _nearest_table()


def read_frame(frame: np.ndarray) -> dict[str, str | None]:
    """One frame, uint8 [H, W, 3] RGB, to its `colour`, `shape` and `ground`; None where unseen."""
    nearest = _NEAREST[tuple(np.moveaxis(frame >> 3, -1, 0))]
    votes = np.bincount(nearest.ravel(), minlength=len(_PALETTE))
    ground = GROUNDS[int(votes[len(COLOURS) :].reshape(-1, 2).sum(1).argmax())]
    best_area, colour, shape = MIN_AREA, None, None
    for index in np.flatnonzero(votes[: len(COLOURS)] >= MIN_AREA):
        blob = cv2.morphologyEx(
            (nearest == index).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)
        )
        outlines, _ = cv2.findContours(blob, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        for outline in outlines:
            area = cv2.contourArea(outline)
            if area > best_area:
                best_area, colour, shape = area, COLOURS[index], _shape(outline)
    return {"colour": colour, "shape": shape, "ground": ground}


class Visit(NamedTuple):
    """The camera at one place of a tour, from frame `start` up to `stop`. `view` is int8 [H, W]:
    each pixel's ground by most frames' vote, -1 where the subject hid it all the time."""

    place: str
    start: int
    stop: int
    view: np.ndarray


def visits(prompt: str, frames: np.ndarray) -> list[Visit]:
    """Stretches of `STAY` frames or more of [T, H, W, 3] that show one place alone.

    A place is known by its ground. Fewer than two grounds in the prompt: not a tour, no visits.
    """
    places = [word for word in re.findall(r"\w+", prompt.lower()) if word in GROUNDS]
    if len(places) < 2:
        return []
    nearest = _NEAREST[tuple(np.moveaxis(frames >> 3, -1, 0))].astype(np.int8)
    ground = np.where(nearest < len(COLOURS), -1, (nearest - len(COLOURS)) // 2)
    shares = np.stack([(ground == GROUNDS.index(name)).mean((1, 2)) for name in places], 1)
    ranked = np.sort(shares, 1)
    alone = (ranked[:, -2] <= ELSEWHERE) & (ranked[:, -1] >= MOST)
    where = np.where(alone, shares.argmax(1), -1)
    edges = [0, *(np.flatnonzero(np.diff(where)) + 1), len(where)]
    found = []
    for start, stop in itertools.pairwise(edges):
        if where[start] < 0 or stop - start < STAY:
            continue
        votes = np.stack([(ground[start:stop] == g).sum(0) for g in range(len(GROUNDS))])
        view = np.where(votes.max(0) > 0, votes.argmax(0), -1).astype(np.int8)
        found.append(Visit(places[where[start]], int(start), int(stop), view))
    return found


def view_error(before: Visit, after: Visit) -> float:
    """How differently two visits to one place look, 0 to 1.

    Of the pixels where either view shows a landmark (another ground than the place's own), the
    share where the views disagree. Pixels that the subject hid in one of them do not count, nor
    do disagreements thinner than `EDGE`, which a camera half a pixel off causes. A place without
    landmarks in both views scores 1: there is nothing to know it by.
    """
    own = GROUNDS.index(before.place)
    seen = (before.view >= 0) & (after.view >= 0)
    landmark = seen & ((before.view != own) | (after.view != own))
    wrong = (landmark & (before.view != after.view)).astype(np.uint8)
    wrong = cv2.morphologyEx(wrong, cv2.MORPH_OPEN, np.ones((EDGE, EDGE), np.uint8))
    return float(wrong.sum() / landmark.sum()) if landmark.any() else 1.0


def loop_closure(prompt: str, frames: np.ndarray) -> list[float]:
    """`view_error` of every return to a place, from another, against its first visit, in order."""
    first: dict[str, Visit] = {}
    errors, here = [], None
    for visit in visits(prompt, frames):
        before = first.setdefault(visit.place, visit)
        if before is not visit and visit.place != here:
            errors.append(view_error(before, visit))
        here = visit.place
    return errors


def judge(frames: np.ndarray) -> dict[str, list[str | None]]:
    """Readings of every frame of [T, H, W, 3], by kind."""
    readings = [read_frame(frame) for frame in frames]
    return {kind: [reading[kind] for reading in readings] for kind in ("colour", "shape", "ground")}


def matches(
    prompt: str, frames: np.ndarray, readings: dict[str, list[str | None]] | None = None
) -> dict[str, bool]:
    """Whether the video shows what the prompt names.

    A kind is right when at least half of all frames *and* at least half of the last second
    read the named word. `both` is subject colour and ground. Words a prompt leaves out are right.
    """
    words = set(re.findall(r"\w+", prompt.lower()))
    readings = judge(frames) if readings is None else readings
    right = {}
    for kind, pool in (("colour", COLOURS), ("shape", SHAPES), ("ground", GROUNDS)):
        wanted = words & set(pool)
        hits = np.array([not wanted or reading in wanted for reading in readings[kind]])
        right[kind] = bool(hits.mean() >= 0.5 and hits[-FPS:].mean() >= 0.5)
    right["both"] = right["colour"] and right["ground"]
    return right


def _shape(outline: np.ndarray) -> str:
    """How well the outline fills the triangle, circle and rectangle around it.

    The thresholds lie between what drawn and what autoencoded (rounder) shapes measure.
    """
    area = cv2.contourArea(outline)
    triangle, _ = cv2.minEnclosingTriangle(outline)
    _, radius = cv2.minEnclosingCircle(outline)
    width, height = cv2.minAreaRect(outline)[1]
    if area > 0.7 * triangle:
        return "triangle"
    if area > 0.83 * np.pi * radius**2:
        return "circle"
    return "square" if area > 0.8 * width * height else "star"


def _score(name: str, clips: list[tuple[str, np.ndarray]]) -> None:
    right: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    for i, (prompt, frames) in enumerate(clips):
        right.update(kind for kind, ok in matches(prompt, frames).items() if ok)
        other = clips[(i + len(clips) // 2) % len(clips)][0]
        wrong.update(kind for kind, ok in matches(other, frames).items() if ok)
    for label, counter in (("own prompt", right), ("another clip's prompt", wrong)):
        line = ", ".join(f"{kind} {counter[kind] / len(clips):.2f}"
                         for kind in ("colour", "ground", "both", "shape"))  # fmt: skip
        print(f"{name}, {label}: {line}")


def _score_tours(name: str, tours: list[tuple[str, np.ndarray]]) -> None:
    """Returns to a tour's own places, and views of two tours over one ground: forgetting."""
    own = [error for prompt, frames in tours for error in loop_closure(prompt, frames)]
    seen = [visits(prompt, frames) for prompt, frames in tours]
    foreign = [view_error(a, b) for here, there in itertools.combinations(seen, 2)
               for a in here for b in there if a.place == b.place]  # fmt: skip
    print(f"{name}, {len(tours)} tours, {len(own)} returns: loop-closure error {np.mean(own):.3f}, "
          f"another tour's landmarks {np.mean(foreign):.3f}")  # fmt: skip


def main() -> None:
    import argparse

    from world import make_clip, make_tour

    parser = argparse.ArgumentParser(description="Scores the judge on drawn and decoded clips.")
    parser.add_argument("--autoencoder", help="weights: also judge clips that went through it")
    parser.add_argument("--clips", type=int, default=60)
    args = parser.parse_args()
    rng = np.random.default_rng(99)
    clips = [make_clip(rng, 80)[:2] for _ in range(args.clips)]
    tours = [make_tour(rng, 2 * 80)[:2] for _ in range(args.clips // 2)]
    _score("drawn", clips)
    _score_tours("drawn", tours)
    if args.autoencoder:
        import torch
        from train_autoencoder import load_autoencoder

        model = load_autoencoder(args.autoencoder)

        @torch.inference_mode()
        def there_and_back(frames: np.ndarray) -> np.ndarray:
            pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].contiguous() / 255.0
            out = model.decode(model.encode(pixels))[0].clamp(0, 1).permute(0, 2, 3, 1)
            return (out * 255).round().to(torch.uint8).numpy()

        _score("decoded", [(prompt, there_and_back(frames)) for prompt, frames in clips])
        _score_tours("decoded", [(prompt, there_and_back(frames)) for prompt, frames in tours])


if __name__ == "__main__":
    main()
