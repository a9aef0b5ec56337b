"""Whether a model reads places back: its error on what returns to view after being away, against
its error on what was never there, in tours whose history is drawn and not rolled out.

Both come into view at the edge to which the camera pans, and nothing of either is to be seen: the
blocks are pure noise. What separates them is that one was in the history, beyond the recent blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clip_pass import Layout, clip_flow
from encode_dataset import encode_clips
from torch import Tensor
from world import in_view, make_tour, on_screen

from packforcing import model_config
from packforcing.compressor import Compressor
from packforcing.config import TEMPORAL_FACTOR, Config
from packforcing.model import load_model
from packforcing.transformer import patchify
from packforcing.words import encode_words

BLOCKS, RECENT = 10, 2


def coming(camera: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of each frame, bool [T, SIZE], that came into view in its block of `block` frames:
    those that were in view before, but not in the recent blocks, and those that never were."""
    view = in_view(camera)
    back, new = np.zeros_like(view), np.zeros_like(view)
    for t in range(block, len(view)):
        begin = t // block * block
        before = view[:begin].any(0)
        back[t] = view[t] & before & ~view[max(begin - RECENT * block, 0) : begin].any(0)
        new[t] = view[t] & ~before
    return on_screen(back, camera), on_screen(new, camera)


def tokens_of(config: Config, pixels: np.ndarray) -> Tensor:
    """Tokens, bool [BLOCKS, N], that lie within the pixels, bool [T, SIZE, SIZE]."""
    cell = config.spatial_factor * config.patch
    share = F.avg_pool3d(torch.from_numpy(pixels)[None].float(), (TEMPORAL_FACTOR, cell, cell))
    return share.reshape(BLOCKS, -1) > 0.9


@torch.inference_mode()
def probe(weights: Path, tours: int, sink: int, seed: int = 777) -> dict[str, float]:
    """Mean squared error of the flow at pure noise on tokens that come `back` and that are `new`,
    and their share of all tokens, `back_share`; with `sink` first blocks kept whole."""
    config = model_config("demo")
    model = load_model(config, weights)
    compressor = Compressor(config, model.autoencoder.encode)
    frames, span = BLOCKS * config.block_frames * TEMPORAL_FACTOR, config.block_frames
    layout = Layout.make(config, BLOCKS, 1, sink, RECENT)
    errors: dict[str, list[Tensor]] = {"back": [], "new": []}
    tokens = 0
    for i in range(tours):
        tour = make_tour(np.random.default_rng([seed, i]), frames)
        drawn = encode_clips(compressor, [tour])
        clean = drawn["latents"].float().unflatten(1, (BLOCKS, span))
        low = drawn["low"][:, ::span].float()
        x0 = patchify(clean.flatten(0, 1), config.patch)[None, :, None]
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(i))
        text = torch.from_numpy(encode_words(tour.prompt, config)).expand(BLOCKS, -1, -1)[None]
        flow = clip_flow(model, layout, clean, clean, low, noise, torch.ones(x0.shape[:3]), text)
        error = (flow - (noise - x0)).square().mean(-1)[0, :, 0]
        tokens += error.numel()
        for kind, columns in zip(errors, coming(tour.camera, frames // BLOCKS)):
            which = tokens_of(config, (tour.masks < 128) & columns[:, None])
            errors[kind].append(error[which])
    by_kind = {kind: torch.cat(each) for kind, each in errors.items()}
    means = {kind: each.mean().item() for kind, each in by_kind.items()}
    return {**means, "back_share": len(by_kind["back"]) / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True, help="of the whole model")
    parser.add_argument("--tours", type=int, default=16)
    args = parser.parse_args()
    for sink in (0, 1):
        errors = probe(args.weights, args.tours, sink)
        print(
            f"sink {sink}: error {errors['back']:.4f} on what comes back "
            f"({errors['back_share']:.1%} of all tokens), {errors['new']:.4f} on what is new, "
            f"ratio {errors['back'] / errors['new']:.2f}"
        )


if __name__ == "__main__":
    main()
