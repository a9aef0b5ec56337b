"""Draws clips and encodes them once: what `train_transformer.py` reads.

Long clips and tours (21 latent frames) teach motion and memory; short ones (one block from an
empty past) teach the first block of a video, which has no history to lean on. The
compressor's low branch depends on frozen weights alone, so its tokens are stored instead of
pixels, for a block starting at any latent frame.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from train_autoencoder import load_autoencoder
from world import make_clip, make_tour

from packforcing import model_config
from packforcing.compressor import Compressor
from packforcing.config import TEMPORAL_FACTOR
from packforcing.text import encode_words

KINDS = {  # who draws them, latent frames
    "long": (make_clip, 21),
    "tour": (make_tour, 21),
    "short": (make_clip, 2),
    "short-tour": (make_tour, 2),
}
BATCH = 4  # clips encoded together


@torch.inference_mode()
def encode(compressor: Compressor, rng: np.random.Generator, kind: str, clips: int
           ) -> dict[str, Tensor]:  # fmt: skip
    """Tensors of `clips` new clips of T latent frames:

    latents fp16 [clips, T, C, h, w]; low fp16 [clips, T - 1, N_c, P], the low branch of the
    two latent frames from each on; words bool [clips, text_len, text_dim]; cover uint8
    [clips, T, grid rows, grid columns], the subject's share of each token, 0 to 255.
    """
    config = compressor.config
    make, latent_frames = KINDS[kind]
    drawn = [make(rng, TEMPORAL_FACTOR * latent_frames) for _ in range(clips)]
    pixels = torch.from_numpy(np.stack([clip.frames for clip in drawn])).permute(0, 1, 4, 2, 3)
    pixels = pixels.contiguous().float() / 255
    latents = compressor.encode(pixels)
    block = config.block_frames
    starts = range(latent_frames - block + 1)
    low = [
        compressor.low_branch(pixels[:, TEMPORAL_FACTOR * s : TEMPORAL_FACTOR * (s + block)])
        for s in starts
    ]
    masks = torch.from_numpy(np.stack([clip.masks for clip in drawn]))[:, None].float()
    cell = config.spatial_factor * config.patch
    cover = F.avg_pool3d(masks, (TEMPORAL_FACTOR, cell, cell))[:, 0]
    words = np.concatenate([encode_words(clip.prompt, config) for clip in drawn])
    return {
        "latents": latents.half(),
        "low": torch.stack(low, 1).half(),
        "words": torch.from_numpy(words).bool(),
        "cover": cover.round().to(torch.uint8),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--autoencoder", type=Path, required=True, help="trained weights")
    parser.add_argument("--out", type=Path, required=True, help="folder; one file per call")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--clips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1, help="other seeds draw other clips")
    args = parser.parse_args()

    torch.set_num_threads(1)  # run several with different seeds instead
    compressor = Compressor(model_config("demo"), load_autoencoder(args.autoencoder))
    rng = np.random.default_rng([args.seed, KINDS[args.kind][1]])
    parts = [
        encode(compressor, rng, args.kind, BATCH)
        for _ in tqdm(range(0, args.clips, BATCH), desc=args.kind, mininterval=5)
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    save_file(together, args.out / f"{args.kind}-{args.seed}.safetensors")


if __name__ == "__main__":
    main()
