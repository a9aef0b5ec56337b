"""What Self-Forcing's own code computed in float32, with random weights, and the same in NumPy.

The numbers are no part of this repository. A folder beside the checkout may have them: seven blocks
of three latent frames under three histories, all with absolute positions.
`python -m tests.golden.self_forcing --folder PATH` writes the NumPy rollouts of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.golden.make_golden import parse_folder
from tests.golden.numpy_rollout import Settings, rollout
from tests.golden.numpy_transformer import Array

PUBLISHED = Path(__file__).parents[3] / "shared" / "golden"
BLOCKS = 7
POLICIES: dict[str, dict[str, Any]] = {
    name: {"sink": sink, "mid": 0, "recent": recent, "positions": "absolute"}
    for name, sink, recent in (("full", 0, BLOCKS), ("window9", 0, 2), ("sink3_window12", 1, 2))
}


def load_published() -> dict[str, Array]:
    """Read text, noise and results, float32."""
    with np.load(PUBLISHED / "self_forcing_tiny.npz") as file:
        return dict(file)


def load_weights() -> dict[str, Array]:
    """Read the transformer's weights, float32, by checkpoint name."""
    weights = load_file(PUBLISHED / "self_forcing_tiny_weights.safetensors")
    return {f"transformer.{name}": values for name, values in weights.items()}


def pick_noise(published: dict[str, Array], block: int, draw: int) -> Array:
    """Return the noise of a block and a draw, float32 [3, C, h, w]."""
    if draw == 0:
        return published["noise"][0, 3 * block : 3 * block + 3]
    return published["renoise"][block, draw - 1, 0]


def main() -> None:
    """Write one file per history: `latents` and `first_flow`, [blocks, 3, C, h, w]."""
    folder = parse_folder()
    published = load_published()
    weights = {name: values.astype(np.float64) for name, values in load_weights().items()}
    for name, policy in POLICIES.items():
        settings = Settings(
            heads=2, block_frames=3, grid=(4, 6), patch=2, text_len=16,
            sampler="renoise", timesteps=(1000, 750, 500, 250), shift=5.0, **policy,
        )  # fmt: skip

        def noise(block: int, draw: int) -> Array:
            return pick_noise(published, block, draw).astype(np.float64)

        results = list(rollout(weights, settings, published["text"][0], BLOCKS, noise))
        np.savez_compressed(
            folder / f"{name}.npz",
            latents=np.array([result.latents for result in results]),
            first_flow=np.array([result.first_flow for result in results]),
        )


if __name__ == "__main__":
    main()
