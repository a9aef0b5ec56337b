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
import team
import torch
import torch.nn.functional as F
from optim import Muon, make_optimisers, rate_factor, set_rate
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from world import SIZE, make_clip, make_tour

from packforcing import model_config
from packforcing.autoencoder import MemBlock, TinyAutoencoder

FRAMES = 12  # per clip: three latent frames
CROP = 64  # pixels
TOURS = 0.3  # share of the clips


def draw_batch(rng: np.random.Generator, clips: int, crop: int, frames: int = FRAMES) -> Tensor:
    """Clips as float32 [clips, frames, 3, crop, crop] in 0..1, cropped about the subject."""
    batch = []
    for _ in range(clips):
        clip = (make_tour if rng.random() < TOURS else make_clip)(rng, frames)
        ys, xs = np.nonzero(clip.masks[frames // 2])
        corner = np.array([ys.mean(), xs.mean()]) - crop / 2 + rng.uniform(-crop, crop, 2) * 0.5
        y, x = np.clip(np.rint(corner), 0, SIZE - crop).astype(int)
        batch.append(clip.frames[:, y : y + crop, x : x + crop])
    pixels = torch.from_numpy(np.stack(batch)).permute(0, 1, 4, 2, 3)
    return pixels.contiguous().float() / 255


def reconstruction_loss(output: Tensor, target: Tensor, sharpness: float = 1.0) -> Tensor:
    """MSE, plus L1 of pixels and of image gradients, so that edges stay sharp.

    A new model needs a start on MSE alone: L1 keeps it at the mean color for hundreds of
    steps. The term on color differences, over 8x8 pixels, is there because hues come last
    otherwise.
    """
    sharp = F.l1_loss(output, target)
    for axis in (-1, -2):
        sharp = sharp + F.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    error = output - target
    color = F.avg_pool2d((error - error.roll(1, -3)).flatten(0, 1), 8)  # R - B, G - R, B - G
    return 5 * F.mse_loss(output, target) + 5 * color.square().mean() + sharpness * sharp


def scale_penalty(latents: Tensor) -> Tensor:
    """Pulls each channel of [B, T, C, h, w] to zero mean and unit variance."""
    mean = latents.mean((0, 1, 3, 4))
    std = latents.std((0, 1, 3, 4))
    return mean.square().mean() + (std - 1).square().mean()


def psnr(output: Tensor, target: Tensor) -> float:
    return -10 * F.mse_loss(output.clamp(0, 1), target).log10().item()


@torch.no_grad()
def sample_latents(model: TinyAutoencoder, rng: np.random.Generator) -> Tensor:
    """Latents of 32 whole clips."""
    batches = [draw_batch(rng, 4, SIZE, frames=16) for _ in range(8)]
    return torch.cat([model.encode(frames) for frames in batches])


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
    parser.add_argument("--start", type=Path, help="weights to refine: the decoder alone, so that "
                        "data encoded with them stays good")  # fmt: skip
    parser.add_argument("--encoder", action="store_true", help="the encoder too: encode anew")
    parser.add_argument("--minutes", type=float, default=20, help="of computing, the whole run")
    parser.add_argument("--clips", type=int, default=3, help="crops per step and worker")
    parser.add_argument("--workers", type=int, default=2, help="one-thread processes")
    parser.add_argument("--lr", type=float, default=2e-3, help="Muon's; AdamW's is half")
    parser.add_argument("--noise", type=float, default=0.1, help="added to latents in training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    team.run(args.workers, train, args)


def train(rank: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = TinyAutoencoder(model_config("demo"))
    initialise(model)
    if args.start:
        model.load_state_dict(load_file(args.start))
        model.encoder.requires_grad_(args.encoder)
    torch.manual_seed(args.seed * 1000 + rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 4]
    others = [p for p in trained if p.ndim != 4]
    optimisers = make_optimisers(matrices, others, args.lr, args.lr / 2)
    progress = args.out.with_suffix(".resume.pt")
    step, seconds, folded = 0, 0.0, bool(args.start)
    if progress.exists():
        saved = torch.load(progress, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(optimisers, saved["optimisers"]):
            optimiser.load_state_dict(state)
            for group in optimiser.param_groups:  # the rate asked for now
                group["peak"] = args.lr if isinstance(optimiser, Muon) else args.lr / 2
        step, seconds, folded = saved["step"], saved["seconds"], saved.get("folded", False)

    length = args.minutes * 60
    bar = Progress(disable=rank > 0)
    task = bar.add_task("training", total=length, completed=seconds)
    bar.start()
    last_save, average, clock = seconds, None, torch.zeros(1)
    while seconds < length:
        begun = time.process_time()
        if not folded and seconds > 0.7 * length:  # early enough to mend what it disturbs
            fold_scale(model, sample_latents(model, np.random.default_rng(777)))
            folded = True
        set_rate(optimisers, rate_factor(seconds / length, decay=0.8 if args.start else 0.4))
        sharpness = 1.0 if args.start else min(1.0, seconds / (0.2 * length))
        rng = np.random.default_rng([args.seed, step, rank])
        whole = step % 5 == 4
        frames = draw_batch(rng, max(1, args.clips // 4) if whole else args.clips,
                            SIZE if whole else CROP)  # fmt: skip
        latents = model.encode(frames)
        noise = sharpness * args.noise * torch.randn_like(latents)
        output = model.decode(latents + noise)
        loss = reconstruction_loss(output, frames, sharpness) + 0.1 * scale_penalty(latents)
        loss.backward()
        team.average_gradients(trained)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        step += 1
        error = F.mse_loss(output, frames).item()
        average = error if average is None else 0.95 * average + 0.05 * error
        clock.fill_(time.process_time() - begun)
        team.add_up([clock], 1 / args.workers)  # so that all stop at the same step
        seconds += clock.item()
        bar.update(task, completed=seconds)
        if step % 50 == 0 and rank == 0:
            print(f"step {step}, {seconds:.0f} s: {-10 * np.log10(average):.2f} dB, "
                  f"latent std {latents.std():.2f}", flush=True)  # fmt: skip
        if rank == 0 and (seconds - last_save > 120 or seconds >= length):
            last_save = seconds
            state = {
                "model": model.state_dict(),
                "step": step,
                "seconds": seconds,
                "folded": folded,
                "optimisers": [o.state_dict() for o in optimisers],
            }
            torch.save(state, progress.with_suffix(".partial"))
            progress.with_suffix(".partial").replace(progress)
    bar.stop()
    if rank == 0:
        finish(model, args.out, fold=args.encoder or not args.start)


def initialise(model: TinyAutoencoder) -> None:
    """Keeps the signal's size through the depth: the default lets it shrink at every stage."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MemBlock):  # nearly the identity
                module.conv[0].weight.mul_(2**0.5)
                module.conv[2].weight.mul_(2**0.5)
                module.conv[4].weight.mul_(0.2)
        model.decoder[-1].weight.mul_(0.3)
        model.decoder[-1].bias.fill_(0.4)  # about the mean picture


@torch.no_grad()
def finish(model: TinyAutoencoder, out: Path, fold: bool = True) -> None:
    """Folds the scale, saves, and prints the PSNR of 24 clips never seen."""
    if fold:
        fold_scale(model, sample_latents(model, np.random.default_rng(778)))
    rng = np.random.default_rng(12345)
    clips = [draw_batch(rng, 4, SIZE, frames=16) for _ in range(6)]
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out)
    values = [psnr(model.decode(model.encode(frames)), frames) for frames in clips]
    print(f"PSNR {np.mean(values):.2f} dB over {len(clips) * 4} whole clips; wrote {out}")


def load_autoencoder(path: Path) -> TinyAutoencoder:
    """From a file of its own, or of a whole model."""
    model, prefix = TinyAutoencoder(model_config("demo")), "autoencoder."
    state = load_file(path)
    of_model = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    model.load_state_dict(of_model or state)
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    main()
