"""A small rollout of our own, written down: the reference must keep computing it.

    python -m tests.golden     writes tests/golden.npz anew (only when the model itself changes)

Weights and noise come from seeded numpy generators, so the file holds results alone.
`test_golden.py` also ties the same reference to Self-Forcing's own numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from packforcing.reference import rollout
from packforcing.sampler import draw_noise
from packforcing.words import encode_words
from tests.helpers import TINY, make_tiny_model

FILE = Path(__file__).with_name("golden.npz")
BLOCKS = 10


def compute() -> dict[str, np.ndarray]:
    """Latents [blocks, B_f, C, h, w], thumbnails of the frames and what each block read."""
    model = make_tiny_model()
    text = torch.from_numpy(encode_words("a cyan star over teal dots", TINY))
    blocks = list(rollout(model, text, BLOCKS, lambda b, s: draw_noise(TINY, 11, b, s)))
    reads = np.full((BLOCKS, TINY.policy.mid), -1)
    for block in blocks:
        reads[block.index, : len(block.read)] = block.read
    return {
        "latents": np.stack([block.latents.numpy() for block in blocks]),
        "frames": np.stack([block.frames[:, :, ::8, ::8].numpy() for block in blocks]),
        "reads": reads,
    }


if __name__ == "__main__":
    np.savez_compressed(FILE, **compute())
