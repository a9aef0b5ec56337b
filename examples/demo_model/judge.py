"""Reads colours and shape back from frames of the demo world. Numpy and OpenCV, no model.

A pixel belongs to the nearest colour of the palette (eight subjects, two tones of six grounds).
The ground is the majority's; the subject is the largest blob of one subject colour, and its
outline tells the shape. `matches` states when a video counts as right.
"""

from __future__ import annotations

import re
from collections import Counter

import cv2
import numpy as np
from world import GROUND_RGB, SUBJECT_RGB

from packforcing.text import COLOURS, GROUNDS, SHAPES

MIN_AREA = 350  # pixels; the smallest subject drawn covers 480
FPS = 16
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


def main() -> None:
    import argparse

    from world import make_clip

    parser = argparse.ArgumentParser(description="Scores the judge on drawn and decoded clips.")
    parser.add_argument("--autoencoder", help="weights: also judge clips that went through it")
    parser.add_argument("--clips", type=int, default=60)
    args = parser.parse_args()
    rng = np.random.default_rng(99)
    clips = [make_clip(rng, 80)[:2] for _ in range(args.clips)]
    _score("drawn", clips)
    if args.autoencoder:
        import torch
        from train_autoencoder import load_autoencoder

        model = load_autoencoder(args.autoencoder)
        decoded = []
        with torch.inference_mode():
            for prompt, frames in clips:
                pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].contiguous() / 255.0
                out = model.decode(model.encode(pixels))[0].clamp(0, 1).permute(0, 2, 3, 1)
                decoded.append((prompt, (out * 255).round().to(torch.uint8).numpy()))
        _score("through the autoencoder", decoded)


if __name__ == "__main__":
    main()
