"""What a video hands out: blocks of frames, in the form that a consumer asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from packforcing.prompts import Switch
from packforcing.runtime.device import Array

FrameForm = Literal["uint8", "float32", "device"]


@dataclass(frozen=True)
class BlockInfo:
    """What is known of a block once it is made.

    Attributes:
        index: The block, from 0 on.
        blocks: Blocks of the video; None while it has no end.
        frames: Frames delivered so far, this block's included.
        frames_total: Frames of the video; None while it has no end.
        read: The archived blocks that this block read.
        seconds: Wall time of the block, without the consumer's.
        switch: The switch that takes effect with this block, or None.
        recovered: Whether an interrupted run had generated it: it was decoded and committed again.
        behind_seconds: How long a viewer has waited for blocks so far, as playback is faster than
            rendering. 0 for a video that is not paced.
    """

    index: int
    blocks: int | None
    frames: int
    frames_total: int | None
    read: list[int]
    seconds: float
    switch: Switch | None
    recovered: bool = False
    behind_seconds: float = 0.0


@dataclass(frozen=True)
class StepInfo:
    """What `on_step` receives after each denoising step.

    Attributes:
        block: The block in the making.
        step: The step, from 0 on.
        steps: Steps of the block.
    """

    block: int
    step: int
    steps: int


@dataclass(frozen=True)
class Block:
    """A block of a video.

    Attributes:
        frames: RGB. "uint8": uint8 [n, H, W, 3]. "float32": float32 [n, H, W, 3] in 0..1.
            "device": [n, 3, H, W] in 0..1 in the backend's own memory, for `from_dlpack` of other
            libraries; the next block overwrites it.
        latents: Clean latents, float32 [B_f, C, h, w].
        info: Which block it is.
    """

    frames: np.ndarray | Array
    latents: np.ndarray
    info: BlockInfo


def convert_frames(form: FrameForm, pixels: Array) -> np.ndarray | Array:
    """Return pixels, [n, 3, H, W] in 0..1, in the form that a consumer asks for."""
    if form == "device":
        return pixels
    if form == "float32":
        return np.ascontiguousarray(pixels.host.transpose(0, 2, 3, 1), np.float32)
    return to_bytes(pixels.host)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels, float32 or float16 [n, 3, H, W] in 0..1, to frames, uint8 [n, H, W, 3].

    Rounds in float32.
    """
    scaled = pixels * np.float32(255)
    scaled += np.float32(0.5)
    planes = scaled.astype(np.uint8)
    frames = np.empty((len(pixels), *pixels.shape[2:], 3), np.uint8)
    for channel in range(3):  # three strided copies: NumPy's transposed copy takes thrice as long
        frames[..., channel] = planes[:, channel]
    return frames
