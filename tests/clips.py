"""Small clips for tests of video files: frames that are hard or easy to keep, and their writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from packforcing.runtime.video_files import open_video

WIDTH, HEIGHT, FPS = 48, 32, 16


def noise(count: int, seed: int = 0) -> np.ndarray:
    """The hardest frames to keep exactly, uint8 [count, HEIGHT, WIDTH, 3]."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)


def flat(*colors: tuple[int, int, int], repeat: int = 1) -> np.ndarray:
    """Frames of one RGB color each, every one `repeat` times."""
    frames = np.repeat(np.array(colors, np.uint8), repeat, axis=0)
    return np.broadcast_to(frames[:, None, None], (len(frames), HEIGHT, WIDTH, 3))


def write(path: str | Path, *blocks: np.ndarray) -> None:
    with open_video(path, WIDTH, HEIGHT, FPS) as video:
        for block in blocks:
            video.write(block)
