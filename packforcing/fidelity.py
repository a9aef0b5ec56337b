"""How near one video is to another, frame by frame: PSNR and SSIM. NumPy and OpenCV."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from packforcing.evaluate import read_frames

WINDOW, SIGMA = (11, 11), 1.5  # of SSIM, in pixels
STABLE = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # of its two quotients


class Fidelity(NamedTuple):
    psnr: float | None  # dB, of the mean squared error over all frames; None where they are equal
    ssim: float  # mean over frames; 1 where they are equal


def fidelity(video: Path, reference: Path, frames: int) -> Fidelity:
    """Of the first frames of two videos of one size; raises `VideoError`."""
    return compare_frames(*(islice(read_frames(path), frames) for path in (video, reference)))


def compare_frames(given: Iterable[np.ndarray], wanted: Iterable[np.ndarray]) -> Fidelity:
    """Of frames, uint8 RGB [H, W, 3]; raises `ValueError` where there are more of one."""
    squared, likeness = [], []
    for a, b in zip(given, wanted, strict=True):
        squared.append(np.mean((a.astype(np.float32) - b) ** 2, dtype=np.float64))
        likeness.append(ssim(a, b))
    error = float(np.mean(squared))
    psnr = 10 * math.log10(255**2 / error) if error else None
    return Fidelity(psnr, float(np.mean(likeness)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two pictures' luma: Wang et al., Image quality assessment (2004),
    equation 13, with its Gaussian window and constants, over windows that lie inside."""
    x, y = (cv2.cvtColor(one, cv2.COLOR_RGB2GRAY).astype(np.float64) for one in (a, b))
    edge = WINDOW[0] // 2

    def local(values: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(values, WINDOW, SIGMA)[edge:-edge, edge:-edge]

    mean_x, mean_y = local(x), local(y)
    spread_x, spread_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    together = local(x * y) - mean_x * mean_y
    c1, c2 = STABLE
    return float(
        np.mean(
            (2 * mean_x * mean_y + c1) * (2 * together + c2)
            / ((mean_x**2 + mean_y**2 + c1) * (spread_x + spread_y + c2))
        )
    )  # fmt: skip
