"""Trains the demo's `TinyAutoencoder` on freshly drawn clips, for a given number of minutes.

Mostly small crops around the subject (edges are what is hard, ground is cheap), the rest whole
pictures. Latents are kept near zero mean and unit variance by a small penalty; what is left of
that is folded into the weights at the end (`finish`).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from optim import make_optimisers, rate_factor, set_rate
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from world import SIZE, make_clip

from packforcing import model_config
from packforcing.autoencoder import TinyAutoencoder

FRAMES = 12  # per clip: three latent frames
CROP = 64  # pixels


def draw_batch(rng: np.random.Generator, clips: int, crop: int, frames: int = FRAMES) -> Tensor:
    """Clips as float32 [clips, frames, 3, crop, crop] in 0..1, cropped about the subject."""
    batch = []
    for _ in range(clips):
        clip = make_clip(rng, frames)
        ys, xs = np.nonzero(clip.masks[frames // 2])
        corner = np.array([ys.mean(), xs.mean()]) - crop / 2 + rng.uniform(-crop, crop, 2) * 0.5
        y, x = np.clip(np.rint(corner), 0, SIZE - crop).astype(int)
        batch.append(clip.frames[:, y : y + crop, x : x + crop])
    pixels = torch.from_numpy(np.stack(batch)).permute(0, 1, 4, 2, 3)
    return pixels.contiguous().float() / 255


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + MSE + L1 of the image gradients, so that edges stay sharp."""
    loss = F.l1_loss(output, target) + 2 * F.mse_loss(output, target)
    for axis in (-1, -2):
        loss = loss + F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


def scale_penalty(latents: Tensor) -> Tensor:
    """Pulls each channel of [B, T, C, h, w] to zero mean and unit variance."""
    mean = latents.mean((0, 1, 3, 4))
    std = latents.std((0, 1, 3, 4))
    return mean.square().mean() + (std - 1).square().mean()


def psnr(output: Tensor, target: Tensor) -> float:
    return -10 * F.mse_loss(output.clamp(0, 1), target).log10().item()


@torch.no_grad()
def fold_scale(model: TinyAutoencoder, latents: Tensor) -> None:
    """Makes latents like these zero-mean and unit-variance; the decoder undoes it."""
    mean = latents.mean((0, 1, 3, 4))
    std = latents.std((0, 1, 3, 4))
    print(f"folded: mean {mean.abs().max():.3f} at most, std {std.min():.3f} to {std.max():.3f}")
    encoder, decoder = model.encoder[-1], model.decoder[1]
    encoder.bias.copy_((encoder.bias - mean) / std)
    encoder.weight.div_(std[:, None, None, None])
    # the decoder's convolution pads with zeros, so a shift would not be exact at the border;
    # the penalty keeps it tiny
    decoder.bias.add_(torch.einsum("ocij,c->o", decoder.weight, mean))
    decoder.weight.mul_(std[None, :, None, None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="weights, .safetensors")
    parser.add_argument("--minutes", type=float, default=25, help="length of the whole run")
    parser.add_argument("--clips", type=int, default=6, help="crops per step")
    parser.add_argument("--lr", type=float, default=5e-3, help="Muon's; AdamW's is half")
    parser.add_argument("--noise", type=float, default=0.1, help="added to latents in training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = TinyAutoencoder(model_config("demo"))
    matrices = [p for p in model.parameters() if p.ndim == 4]
    others = [p for p in model.parameters() if p.ndim != 4]
    optimisers = make_optimisers(matrices, others, args.lr, args.lr / 2)
    progress = args.out.with_suffix(".resume.pt")
    step, seconds = 0, 0.0
    if progress.exists():
        saved = torch.load(progress, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(optimisers, saved["optimisers"]):
            optimiser.load_state_dict(state)
        step, seconds = saved["step"], saved["seconds"]

    bar = tqdm(total=round(args.minutes * 60), initial=round(seconds), unit="s", mininterval=10)
    last_save, average = seconds, None
    while seconds < args.minutes * 60:
        begun = time.monotonic()
        set_rate(optimisers, rate_factor(seconds / (args.minutes * 60)))
        rng = np.random.default_rng([args.seed, step])
        whole = step % 5 == 4
        frames = draw_batch(rng, max(1, args.clips // 3) if whole else args.clips,
                            SIZE if whole else CROP)  # fmt: skip
        latents = model.encode(frames)
        output = model.decode(latents + args.noise * torch.randn_like(latents))
        loss = reconstruction_loss(output, frames) + 0.1 * scale_penalty(latents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        step += 1
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        elapsed = time.monotonic() - begun
        seconds += elapsed
        bar.update(round(seconds) - bar.n)
        if step % 50 == 0:
            bar.write(f"{step} {seconds:.0f}s loss {average:.4f} psnr {psnr(output, frames):.1f} "
                      f"std {latents.std():.2f}")  # fmt: skip
        if seconds - last_save > 120 or seconds >= args.minutes * 60:
            last_save = seconds
            torch.save({"model": model.state_dict(), "step": step, "seconds": seconds,
                        "optimisers": [o.state_dict() for o in optimisers]}, progress)  # fmt: skip
    bar.close()
    finish(model, args.out)


@torch.no_grad()
def finish(model: TinyAutoencoder, out: Path) -> None:
    """Folds the scale, saves, and prints the PSNR of 24 clips never seen."""
    rng = np.random.default_rng(12345)
    clips = [draw_batch(rng, 4, SIZE, frames=16) for _ in range(6)]
    fold_scale(model, torch.cat([model.encode(frames) for frames in clips]))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out)
    values = [psnr(model.decode(model.encode(frames)), frames) for frames in clips]
    print(f"PSNR {np.mean(values):.2f} dB over {len(clips) * 4} whole clips; wrote {out}")


def load_autoencoder(path: Path) -> TinyAutoencoder:
    model = TinyAutoencoder(model_config("demo"))
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
