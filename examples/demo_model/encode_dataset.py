"""Draws clips and encodes them once: what `train_transformer.py` reads.

Long clips and tours (21 latent frames) teach motion and memory; short ones (one block from an
empty past) teach the first block of a video, which has no history to lean on. The
compressor's low branch depends on frozen weights alone, so its tokens are stored instead of
pixels, for a block starting at any latent frame.

Long clips come with a double: the same but for the subject's shape. A rollout that loses the
shape looks like it, and no noise on the history does.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor
from train_autoencoder import load_autoencoder
from world import BLOCK, Clip, Visits, make_clip, make_tour, make_visits

from packforcing import model_config
from packforcing.compressor import Compressor
from packforcing.config import TEMPORAL_FACTOR
from packforcing.words import SHAPES, encode_words

KINDS = {  # who draws them, latent frames, doubles
    "long": (make_clip, 21, True),
    "tour": (make_tour, 21, False),
    "short": (make_clip, 2, False),
    "short-tour": (make_tour, 2, False),
    "visits": (lambda rng, frames: make_visits(rng, frames // BLOCK), 32, False),
}
BATCH = 1  # clip encoded at a time: more of them leave the caches


def draw_pair(make: Callable, rng: np.random.Generator, frames: int) -> tuple[Clip, Clip]:
    """A new clip and its double."""
    again = copy.deepcopy(rng)
    clip = make(rng, frames)
    others = [shape for shape in SHAPES if shape not in clip.prompt.split()]
    return clip, make(again, frames, shape=str(rng.choice(others)))


def encode_clips(compressor: Compressor, clips: Sequence[Clip | Visits]) -> dict[str, Tensor]:
    """latents fp16 [clips, T, C, h, w]; low fp16 [clips, T - 1, N_c, P], the low branch of the
    two latent frames from each on."""
    pixels = torch.from_numpy(np.stack([clip.frames for clip in clips])).permute(0, 1, 4, 2, 3)
    pixels = pixels.contiguous().float() / 255
    latents = compressor.encode(pixels)
    block = compressor.config.block_frames
    low = [
        compressor.low_branch(pixels[:, TEMPORAL_FACTOR * s : TEMPORAL_FACTOR * (s + block)])
        for s in range(latents.shape[1] - block + 1)
    ]
    return {"latents": latents.half(), "low": torch.stack(low, 1).half()}


@torch.inference_mode()
def encode(compressor: Compressor, rng: np.random.Generator, kind: str, clips: int
           ) -> dict[str, Tensor]:  # fmt: skip
    """Tensors of `clips` new clips of T latent frames: those of `encode_clips`;
    double_latents and double_low, of the doubles of long clips; words bool [clips, text_len,
    text_dim], of visits [clips, blocks, text_len, text_dim]; cover and back uint8 [clips, T, grid
    rows, grid columns], the share of each token, 0 to 255, that the subject takes and that which
    came back into view, of visits none: `train_transformer.py` reads it from their words.
    """
    config = compressor.config
    make, latent_frames, doubles = KINDS[kind]
    frames = TEMPORAL_FACTOR * latent_frames
    if doubles:
        drawn, again = zip(*[draw_pair(make, rng, frames) for _ in range(clips)])
        double = encode_clips(compressor, again)
    else:
        drawn, double = [make(rng, frames) for _ in range(clips)], {}
    cell = config.spatial_factor * config.patch

    def share(pixels: list[np.ndarray]) -> torch.Tensor:
        """Of each token, uint8, from uint8 [clips, frames, H, W] or what is as wide."""
        wide = torch.from_numpy(np.stack(pixels))[:, None].float()
        pooled = F.avg_pool3d(wide, (TEMPORAL_FACTOR, cell, cell))
        return pooled[:, 0].round().to(torch.uint8)

    if kind == "visits":
        words = [[encode_words(p, config)[0] for p in clip.prompts] for clip in drawn]
        back = [np.uint8(0)] * clips
    else:
        words = [encode_words(clip.prompt, config)[0] for clip in drawn]
        back = [np.uint8(255) * clip.back[:, None] for clip in drawn]
    return {
        **encode_clips(compressor, drawn),
        **{f"double_{name}": tensor for name, tensor in double.items()},
        "words": torch.from_numpy(np.array(words)).bool(),
        "cover": share([clip.masks for clip in drawn]),
        "back": share([np.broadcast_to(part, clip.masks.shape)
                       for part, clip in zip(back, drawn)]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--autoencoder", type=Path, required=True, help="trained weights")
    parser.add_argument("--out", type=Path, required=True, help="folder; one file per call")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="other seeds draw other clips")
    args = parser.parse_args()

    torch.set_num_threads(1)  # run several with different seeds instead
    compressor = Compressor(model_config("demo"), load_autoencoder(args.autoencoder).encode)
    rng = np.random.default_rng([args.seed, KINDS[args.kind][1]])
    parts = [
        encode(compressor, rng, args.kind, BATCH)
        for _ in track(range(0, args.clips, BATCH), description=args.kind)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    save_file(together, args.out / f"{args.kind}-{args.seed}.safetensors")


if __name__ == "__main__":
    main()
