"""The golden rollouts: two small models, their weights from seeds, and ways to roll them out.

Everything here is data in the words of the package's config, so that a test can build that config
from it. Nothing is imported from the package. Weights, text and noise are drawn from Philox, a
counter-based generator, so the stored files hold results alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.numpy_rollout import Noise, Result, Settings, rollout
from tests.golden.numpy_transformer import Array
from tests.golden.weights import draw_weights

FOLDER = Path(__file__).parent
TEXT_ROWS = 4  # fewer than text_len: the rest is padding

# The model of most tests. Its token grid is 4 x 6, so two columns fill no compressed token.
TINY: dict[str, Any] = {
    "name": "tiny", "height": 64, "width": 96, "fps": 8, "dim": 48, "heads": 2, "layers": 2,
    "ffn_dim": 64, "freq_dim": 32, "block_frames": 3, "latent_channels": 4, "patch": 2,
    "text_encoder": "words", "text_len": 6, "text_dim": 22, "compressor_widths": (8, 8, 8, 8),
    "vae_encoder_width": 8, "vae_decoder_widths": (8, 8, 8, 8),
}  # fmt: skip
# A grid of 9 x 8, so a compressed block has rows and columns. A head of 32 has 6 channel pairs for
# time and 5 each for row and column. Attention is sharper, so small errors of positions show.
WIDE: dict[str, Any] = {
    **TINY, "name": "wide", "height": 144, "width": 128, "dim": 64, "ffn_dim": 96,
    "compressor_widths": (6, 8, 10, 12), "vae_encoder_width": 6, "vae_decoder_widths": (8, 7, 6, 5),
}  # fmt: skip
SHARPNESS = {"tiny": 1.0, "wide": 2.0}
WEIGHTS_SEED, TEXT_SEED = 7, 8

RENOISE = {"sampler": "renoise", "timesteps": (1000, 750, 500, 250), "shift": 5.0}


@dataclass(frozen=True)
class Case:
    """A rollout: model, policy and sampler in the config's words, its length and its seed."""

    name: str
    model: dict[str, Any]
    policy: dict[str, Any]
    sampler: dict[str, Any]
    blocks: int
    seed: int


CASES = {
    case.name: case
    for case in (
        Case(
            "packforcing",
            TINY,
            {"sink": 1, "mid": 3, "recent": 2, "positions": "packed", "mid_span": 2.5},
            RENOISE,
            blocks=10,
            seed=1,
        ),
        Case(
            "packforcing-wide",
            WIDE,
            {"sink": 2, "mid": 1, "recent": 1, "positions": "packed", "mid_span": 1.75},
            RENOISE,
            blocks=7,
            seed=3,
        ),
        Case(
            "last-step",
            TINY,
            {"sink": 1, "mid": 1, "recent": 1, "positions": "packed", "commit": "last-step"},
            {**RENOISE, "timesteps": (1000, 750, 500), "first_timesteps": (1000, 500)},
            blocks=6,
            seed=11,
        ),
        Case(
            "full-history",
            TINY,
            {"sink": 0, "mid": 0, "recent": 5, "positions": "absolute"},
            RENOISE,
            blocks=6,
            seed=2,
        ),
        Case(
            "sliding-window",
            TINY,
            {"sink": 0, "mid": 0, "recent": 2, "positions": "packed"},
            {"sampler": "renoise", "timesteps": (1000, 757, 522), "warp": False, "shift": 8.0},
            blocks=5,
            seed=4,
        ),
        Case(
            "sink-window",
            TINY,
            {"sink": 1, "mid": 0, "recent": 1, "positions": "absolute"},
            {**RENOISE, "timesteps": (1000, 500), "first_timesteps": (1000, 750, 500, 250)},
            blocks=5,
            seed=5,
        ),
        Case(
            "euler",
            TINY,
            {"sink": 0, "mid": 2, "recent": 1, "positions": "packed"},
            {"sampler": "euler", "timesteps": (1000, 800, 600, 400, 200), "shift": 3.0},
            blocks=6,
            seed=3,
        ),
    )
}


def compute(case: Case) -> Iterator[Result]:
    """Roll a case out in float64."""
    weights = make_weights(case.model)
    double = {name: values.astype(np.float64) for name, values in weights.items()}
    return rollout(double, settings(case), make_text(case.model), case.blocks, make_noise(case))


def settings(case: Case) -> Settings:
    """Put a case into the words of the rollout."""
    _, _, rows, columns = latent_shape(case)
    patch = case.model["patch"]
    return Settings(
        heads=case.model["heads"],
        block_frames=case.model["block_frames"],
        grid=(rows // patch, columns // patch),
        patch=patch,
        text_len=case.model["text_len"],
        **case.policy,
        **case.sampler,
    )


def latent_shape(case: Case) -> tuple[int, int, int, int]:
    """Return the shape of one block's latents, [F, C, h, w]."""
    model = case.model
    cells = model["height"] // 8, model["width"] // 8
    return model["block_frames"], model["latent_channels"], *cells


# What goes in


def make_weights(model: dict[str, Any]) -> dict[str, Array]:
    """Draw all weights of a model, float32, by checkpoint name."""
    return draw_weights(model, WEIGHTS_SEED, SHARPNESS[model["name"]])


def make_text(model: dict[str, Any]) -> Array:
    """Draw the prompt embedding, float32 [rows, text_dim]."""
    rng = np.random.Generator(np.random.Philox(TEXT_SEED))
    return rng.standard_normal((TEXT_ROWS, model["text_dim"]), dtype=np.float32)


def make_noise(case: Case) -> Noise:
    """Return what draws the noise of a case, [F, C, h, w] for a block and a draw.

    It is drawn as the package documents it: float32 normal numbers from Philox with the key (seed,
    0) and the counter (0, 0, draw, block), in the order of tokens and, in a token, of channel, row
    and column of the patch.
    """
    frames, channels, rows, columns = latent_shape(case)
    patch = case.model["patch"]

    def noise(block: int, draw: int) -> Array:
        key = np.array([case.seed, 0], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, draw, block]))
        shape = frames, rows // patch, columns // patch, channels, patch, patch
        x = rng.standard_normal(shape, dtype=np.float32).astype(np.float64)
        return x.transpose(0, 3, 1, 4, 2, 5).reshape(frames, channels, rows, columns)

    return noise


# What comes out


def stored(results: list[Result]) -> dict[str, Array]:
    """Collect what a file holds of a rollout, one row per block.

    `latents` [F, C, h, w] and the flow of the first step, `first_flow`, float32; `frames` as
    `thumbnails` makes them; `read`, the compressed blocks that the block read, filled up with -1.
    """
    most = max(len(result.read) for result in results)
    read = [result.read + [-1] * (most - len(result.read)) for result in results]
    pictures = [thumbnails(result.frames) for result in results if result.frames is not None]
    return {
        "latents": np.array([result.latents for result in results], np.float32),
        "first_flow": np.array([result.first_flow for result in results], np.float32),
        "frames": np.array(pictures),
        "read": np.array(read, np.int16),
    }


def thumbnails(frames: Array) -> Array:
    """Take every 16th row and column of frames [n, 3, H, W] in 0..1, in units of 1 / 65535."""
    return np.rint(frames[:, :, 7::16, 3::16] * 65535).astype(np.uint16)
