"""A small rollout of our own, written down: the reference must keep computing it.

    python -m tests.golden     writes tests/golden.npz anew (only when the model itself changes)

Weights and noise come from seeded numpy generators, so the file holds results alone.
`test_golden.py` also ties the same reference to Self-Forcing's own numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from packforcing.model import random_model
from packforcing.rollout import rollout
from packforcing.sampler import draw_noise
from packforcing.text import encode_words
from tests.conftest import TINY

FILE = Path(__file__).with_name("golden.npz")
BLOCKS = 10


def compute() -> dict[str, np.ndarray]:
    """Latents [blocks, B_f, C, h, w], thumbnails of the frames and what each block read."""
    model = random_model(TINY)
    rng = np.random.Generator(np.random.Philox(7))
    for part in model.parts().values():
        state = part.state_dict()
        for name, tensor in state.items():
            values = rng.standard_normal(tensor.shape, dtype=np.float32)
            scale = (tensor.numel() / tensor.shape[0]) ** -0.5 if tensor.ndim > 1 else 0.1
            state[name] = torch.from_numpy(values * np.float32(scale)) + (tensor.ndim == 1)
        part.load_state_dict(state)
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
