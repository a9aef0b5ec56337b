"""Trains the demo's transformer and compressor together, for a given number of minutes.

Teacher forcing, a whole clip in one pass. Every block is there clean, compressed and noised.
A noised block reads itself and its history as in a rollout: clean sink, clean recent blocks,
compressed blocks between. Clean and compressed blocks (timestep 0) read the same history and
themselves, so the commit and the mid pass are trained as they are used. The loss is on the
noised blocks; the compressor learns through what they read.

Each step also trains blocks without any history: a rollout begins with one, and a subject that
is missing there stays missing. For the same reason tokens that the subject covers weigh more,
and what a block reads is wrong as a rollout's history may be (`mistaken`). A share of the clips
are tours, which only memory continues rightly.

The schedule counts minutes of computing, not of the clock: a busy machine takes longer and trains
the same.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import team
import torch
import torch.nn.functional as F
from clip_pass import Layout, Reading, clip_flow, rope_tables
from encode_dataset import KINDS
from optim import Muon, make_optimisers, rate_factor, set_rate
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn
from train_autoencoder import load_autoencoder

from packforcing import model_config
from packforcing.compressor import Compressor
from packforcing.config import Config
from packforcing.model import Model, save_model
from packforcing.rope import block_positions, rope_table
from packforcing.transformer import Transformer, patchify, rotate
from packforcing.words import GROUNDS, PLACES, VOCABULARY

OUTLINE = (0.5, 0.95)  # noise levels: above, nothing is to be seen; below, all of the subject is
BLUR = 5  # latent cells
KEEP = 0.995  # of the weights' average, per step


def lone_flow(model: Model, noisy: Tensor, sigma: Tensor, text: Tensor, rope) -> Tensor:
    """Flow of first blocks, which have no history: noisy [B, N, P], sigma [B]."""
    transformer = model.transformer
    return transformer.run(
        noisy, None, *transformer.embed_time(1000 * sigma[:, None]), transformer.cross_kv(text),
        lambda q, k, v: F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v),
    )  # fmt: skip


class Data:
    """The encoded clips of a folder, by kind."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.config = config
        self.clips: dict[str, dict[str, Tensor]] = {}
        for kind in KINDS:
            files = sorted(folder.glob(f"{kind}-[0-9]*.safetensors"))
            if not files:
                raise SystemExit(
                    f"no {kind}-*.safetensors in {folder}: run encode_dataset.py first"
                )
            parts = [load_file(file) for file in files]
            self.clips[kind] = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def draw(
        self, rng: np.random.Generator, kind: str, count: int, blocks: int
    ) -> dict[str, Tensor]:
        """latents [count, blocks, B_f, C, h, w], low [count, blocks, N_c, P], the same of the
        clips' doubles where there are any, text, and cover and back [count, blocks, N] in 0..1,
        each clip from a random latent frame on."""
        clips, span = self.clips[kind], self.config.block_frames
        frames = blocks * span
        pick = rng.integers(len(clips["latents"]), size=count)
        starts = rng.integers(clips["latents"].shape[1] - frames + 1, size=count)
        if kind == "visits":  # what is read must have been shown
            starts[:] = 0
        where = torch.from_numpy(starts[:, None] + np.arange(frames))
        rows = torch.from_numpy(pick)[:, None]
        out = {
            name: clips[name][rows, where].float().unflatten(1, (blocks, span))
            for name in ("latents", "double_latents") if name in clips
        }  # fmt: skip
        for name in ("low", "double_low"):
            if name in clips:
                out[name] = clips[name][rows, where[:, ::span]].float()
        for name in ("cover", "back"):
            out[name] = clips[name][rows, where].float().reshape(count, blocks, -1) / 255
        text = clips["words"][torch.from_numpy(pick)].float()
        if kind == "visits":  # one prompt per block
            for clip in text:  # any place may have any name
                names = rng.permutation(len(PLACES)) - len(PLACES)
                clip[..., -len(PLACES) :] = clip[..., torch.from_numpy(names)]
            text = text[:, :blocks]
            needed = needed_blocks(text)
            out["back"] = needed.any(-1)[..., None].float().expand_as(out["back"])
            return {**out, "text": text, "needed": needed}
        left_out = 0.0 if "tour" in kind else 0.1  # one that names a single ground must not pan
        keep = torch.from_numpy(rng.random(text.shape[:2]) >= left_out)
        return {**out, "text": (text * keep[..., None])[:, None].expand(-1, blocks, -1, -1)}


def needed_blocks(text: Tensor) -> Tensor:
    """Of prompts [clips, blocks, text_len, text_dim], the earlier blocks at the same place of every
    block whose prompt names no ground, bool [clips, blocks, blocks]."""
    words = text.amax(2)
    places = words[..., -len(PLACES) :]
    same = (places @ places.mT > 0).tril(-1)
    first = VOCABULARY.index(GROUNDS[0])
    named = words[..., first : first + len(GROUNDS)].any(-1)
    return same & ~named[..., None]


def spread(config: Config, rng: np.random.Generator, blocks: int) -> np.ndarray:
    """Positions of blocks with up to four gaps between them, as in a long history, [blocks]."""
    gaps = np.zeros(blocks)
    gaps[rng.integers(1, blocks, 4)] = rng.uniform(0, 60, 4) * rng.integers(2, size=4)
    return config.block_frames * np.arange(blocks) + np.floor(gaps.cumsum())


def mistaken(drawn: dict[str, Tensor], rng: np.random.Generator, doubles: float
             ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Latents, packed latents and low of drawn clips as a history with mistakes: in a share
    `doubles` of them some blocks show the wrong shape, more or less, and all are noisy, some very.
    Every second one has in the place of a compressed block any that is no newer: what a selection
    reads is older than its place says, and no telling of the time."""
    clips, blocks = drawn["latents"].shape[:2]
    often = (rng.random(clips) < doubles) * rng.random(clips)
    wrong = (rng.random((clips, blocks)) < often[:, None]) * rng.uniform(0.3, 1, (clips, blocks))
    strong = rng.random(clips) < (0.1 if "needed" in drawn else 0.25)  # noise hides what is needed
    harm = np.where(strong, rng.uniform(0.2, 0.9, clips), rng.uniform(0, 0.2, clips))

    def spoil(clean: Tensor, double: Tensor) -> Tensor:
        shape = clips, blocks, *[1] * (clean.ndim - 2)
        mixed = torch.lerp(clean, double, torch.from_numpy(wrong).float().view(shape))
        level = torch.from_numpy(harm).float().view(clips, *[1] * (clean.ndim - 1))
        return torch.lerp(mixed, torch.randn_like(mixed), level)

    latents = spoil(drawn["latents"], drawn.get("double_latents", drawn["latents"]))
    low = spoil(drawn["low"], drawn.get("double_low", drawn["low"]))
    older = rng.integers(np.arange(1, blocks + 1), size=(clips, blocks))
    often = 0.0 if "needed" in drawn else 0.5  # what a block needs must stay
    sources = np.where(rng.random((clips, 1)) < often, older, np.arange(blocks))
    rows = np.arange(clips)[:, None]
    return latents, latents[rows, sources], low[rows, sources]


def mistaken_for(latents: Tensor, sigma: Tensor, patch: int) -> Tensor:
    """What makes noised blocks show another block, blurred, more or less, [B, G, copies, N, P].

    The first step of a rollout predicts muted colors, and half a pan where it does not know. What
    is seen in drawn blocks is right, so that later steps trust it and turn it into another ground
    that is in the history. They have to ask what the history and the prompt say.

    `latents` is [B, G, B_f, C, h, w]; every second block at a noise level `sigma` [B, G, copies]
    from 0.5 to below 1 changes.
    """
    clips, blocks = latents.shape[:2]
    mean = F.avg_pool2d(latents.mean(2).flatten(0, 1), BLUR, 1, BLUR // 2, count_include_pad=False)
    mean = mean.unflatten(0, (clips, blocks))
    change = (mean[:, torch.randint(blocks, (blocks,))] - mean)[:, :, None].expand_as(latents)
    tokens = patchify(change.flatten(0, 1), patch)
    share = torch.rand(sigma.shape) * (torch.rand(sigma.shape) < 0.5)
    share = share * ((sigma >= 0.5) & (sigma < 1))
    return share[..., None, None] * tokens.unflatten(0, (clips, blocks))[:, :, None]


def draw_sigma(shape: tuple[int, ...], shift: float) -> Tensor:
    """Noise levels: half as the sampler meets them, shifted up, half where the outline of the
    subject is decided, and one in twelve pure noise."""
    s = torch.rand(shape)
    sigma = shift * s / (1 + (shift - 1) * s)
    low, high = OUTLINE
    sigma = torch.where(torch.rand(shape) < 0.5, sigma, low + (high - low) * torch.rand(shape))
    return torch.where(torch.rand(shape) < 1 / 12, torch.ones(()), sigma)


def weighted_error(flow: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean square error, where a token counts `weight` times."""
    return (weight * (flow - target).square().mean(-1)).sum() / weight.sum()


def initialise(transformer: Transformer) -> None:
    """Wan's habits: Xavier, zero head; gates open a little, so that every layer learns at once."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(transformer.text_embedding[0].weight)  # words are one-hot rows
    nn.init.normal_(transformer.time_projection[1].weight, std=0.02)
    nn.init.zeros_(transformer.head.head.weight)
    with torch.no_grad():
        transformer.head.modulation.zero_()
        for layer in transformer.blocks:
            layer.modulation.zero_()
            layer.modulation[:, [2, 5]] = 0.3


def load_parts(model: Model, path: Path) -> None:
    """Loads transformer and compressor, of a model that may know fewer words."""
    saved = load_file(path)
    for name in ("transformer", "compressor"):
        part = getattr(model, name)
        state = {key.removeprefix(f"{name}."): value.float() for key, value in saved.items()
                 if key.startswith(f"{name}.")}  # fmt: skip
        if name == "transformer":
            words = part.text_embedding[0].weight.detach().clone()
            known = state["text_embedding.0.weight"]
            words[:, : known.shape[1]] = known
            state["text_embedding.0.weight"] = words
        part.load_state_dict(state)


def train(rank: int, args: argparse.Namespace) -> None:
    config = model_config("demo")
    torch.manual_seed(args.seed)
    autoencoder = load_autoencoder(args.autoencoder)
    model = Model(config, Transformer(config), autoencoder, Compressor(config, autoencoder.encode))
    initialise(model.transformer)
    if args.start:
        load_parts(model, args.start)
    parts = nn.ModuleDict({"transformer": model.transformer, "compressor": model.compressor})
    average = {name: p.detach().clone() for name, p in parts.named_parameters()}
    muon = [p for name, p in parts.named_parameters()
            if p.ndim == 2 and "head" not in name and "embedding.0" not in name]  # fmt: skip
    chosen = {id(p) for p in muon}
    others = [p for p in parts.parameters() if id(p) not in chosen]
    optimisers = make_optimisers(muon, others, args.lr, args.lr / 2, weight_decay=0.01)
    if rank == 0:
        sizes = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (parts, autoencoder)]
        print(f"{sizes[0]:.2f} M parameters, {sizes[1]:.2f} M in the autoencoder", flush=True)

    progress = args.out.with_suffix(".resume.pt")
    step, seconds = 0, 0.0
    if progress.exists():
        saved = torch.load(progress, weights_only=True)
        parts.load_state_dict(saved["model"])
        average = saved["average"]
        for optimiser, state in zip(optimisers, saved["optimisers"]):
            optimiser.load_state_dict(state)
            for group in optimiser.param_groups:  # the rate asked for now
                group["peak"] = args.lr if isinstance(optimiser, Muon) else args.lr / 2
        step, seconds = saved["step"], saved["seconds"]

    data = Data(args.data, config)
    cos, sin = rope_table(block_positions(config, 0), config.head_dim)
    first_rope = torch.from_numpy(cos), torch.from_numpy(sin)
    lone_pass = torch.compile(lone_flow, dynamic=False)  # a fifth faster; whole clips are not
    layouts: dict[tuple[int, int], Layout] = {}
    length, clock = args.minutes * 60, torch.zeros(1)
    bar = Progress(disable=rank > 0)
    task = bar.add_task("training", total=length, completed=seconds)
    bar.start()
    last_save, shown = seconds, dict[str, float]()
    while seconds < length:
        begun = time.process_time()
        done = seconds / length
        set_rate(optimisers, rate_factor(done, decay=args.decay))
        rng = np.random.default_rng([args.seed, step, rank])
        torch.manual_seed(int(rng.integers(2**62)))
        with_clips = done >= args.lone_first
        count = args.lone if with_clips else args.lone + args.clips * 30
        loss = torch.zeros(())

        tours = round(args.tours * count)  # true first blocks, as later ones may show a pan
        fresh = -(-(count - tours) // 3)  # as well; the rest are taken from anywhere in a clip
        drawn = [
            data.draw(rng, "short-tour", tours, 1),
            data.draw(rng, "short", fresh, 1),
            data.draw(rng, "long", count - tours - fresh, 1),
            data.draw(rng, "visits", 2, 1),
        ]
        latents, text, cover = (
            torch.cat([part[name] for part in drawn]) for name in ("latents", "text", "cover")
        )
        text, count = text[:, 0], len(text)
        x0 = patchify(latents.flatten(0, 1), config.patch)
        noise, sigma = torch.randn_like(x0), draw_sigma((count,), args.shift)
        noisy = torch.lerp(x0, noise, sigma[:, None, None])
        flow = lone_pass(model, noisy, sigma, text, first_rope)
        lone = weighted_error(flow, noise - x0, 1 + args.subject_weight * cover[:, 0])
        loss = lone
        shown["lone"] = 0.98 * shown.get("lone", lone.item()) + 0.02 * lone.item()

        if with_clips:
            loss = lone * args.lone_share
            kind = str(rng.choice(["visits", "tour", "long"], p=[args.visits, args.tours,
                                  1 - args.visits - args.tours]))  # fmt: skip
            blocks = KINDS["visits"][1] // config.block_frames if kind == "visits" else args.blocks
            key = blocks, int(rng.choice([0, 1, 1, 1, 2])), int(rng.choice([1, 2, 2, 3]))
            if kind == "visits" and rng.random() < args.whole:  # nothing is compressed
                key = blocks, blocks, 1
            if key not in layouts:
                layouts[key] = Layout.make(config, blocks, args.copies, *key[1:])
            layout, reading = layouts[key], None
            drawn_clips = data.draw(rng, kind, args.clips, blocks)
            if kind == "visits":
                reading = Reading(drawn_clips["needed"])
                if rng.random() < 0.5:
                    layout = replace(layout, rope=rope_tables(config, spread(config, rng, blocks)))
            x0 = patchify(drawn_clips["latents"].flatten(0, 1), config.patch)
            x0 = x0.unflatten(0, (args.clips, -1))[:, :, None].expand(-1, -1, args.copies, -1, -1)
            weight = 1 + args.subject_weight * drawn_clips["cover"]
            weight = weight + args.back_weight * drawn_clips["back"]
            weight = weight[:, :, None].expand(-1, -1, args.copies, -1)
            noise, sigma = torch.randn_like(x0), draw_sigma(x0.shape[:3], args.shift)
            if kind != "long":
                sigma[..., 0] = 1  # with any of it to be seen, a place need not be remembered
            noisy, target = torch.lerp(x0, noise, sigma[..., None, None]), noise - x0
            if kind != "long":  # the target is where x0 lies, as ever
                wrong = mistaken_for(drawn_clips["latents"], sigma, config.patch)
                wrong = wrong * (1 - sigma[..., None, None])
                noisy, target = noisy + wrong, target + wrong / sigma[..., None, None]
            past = drawn_clips
            if kind != "visits" and rng.random() < args.foreign:
                past = data.draw(rng, kind, args.clips, blocks)
            history = mistaken(past, rng, args.doubles)
            text = drawn_clips["text"]
            flow = clip_flow(model, layout, *history, noisy, sigma, text, reading)
            error = weighted_error(flow, target, weight)
            loss = loss + error * (1 - args.lone_share)
            shown[kind] = 0.98 * shown.get(kind, error.item()) + 0.02 * error.item()
            if reading and reading.rows.any():
                missed, confused = reading.loss(layout)
                loss = loss + args.reading * (missed + confused)
                square = (flow - target).square().mean((-1, -2))[:, :, 0]
                for name, value in (
                    ("attention", missed), ("selection", confused),
                    ("recalled", square[reading.rows].mean()),
                    ("others", square[~reading.rows].mean()),
                ):  # fmt: skip
                    shown[name] = 0.98 * shown.get(name, value.item()) + 0.02 * value.item()

        loss.backward()
        team.average_gradients(parts.parameters())
        norm = nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        step += 1
        with torch.no_grad():
            keep = min(KEEP, step / (step + 10))
            for name, p in parts.named_parameters():
                average[name].lerp_(p, 1 - keep)
        clock.fill_(time.process_time() - begun)
        team.add_up([clock], 1 / args.workers)
        seconds += clock.item()
        bar.update(task, completed=seconds)
        if (step % 25 == 0 or step == 5) and rank == 0:
            print(f"step {step}, {seconds:.0f} s, {clock.item():.2f} s a step: "
                  + "".join(f"{name} {value:.3f}, " for name, value in shown.items())
                  + f"gradient {norm:.2f}", flush=True)  # fmt: skip
        if rank == 0 and (seconds - last_save > args.save * 60 or seconds >= length):
            last_save = seconds
            state = {
                "model": parts.state_dict(),
                "average": average,
                "step": step,
                "optimisers": [o.state_dict() for o in optimisers],
                "seconds": seconds,
            }
            torch.save(state, progress.with_suffix(".partial"))
            progress.with_suffix(".partial").replace(progress)
            save_average(model, parts, average, args.out)
    bar.stop()


@torch.no_grad()
def save_average(model: Model, parts: nn.Module, average: dict[str, Tensor], out: Path) -> None:
    """Writes the averaged weights, fp16, with the autoencoder: a checkpoint of the model."""
    current = {name: p.clone() for name, p in parts.named_parameters()}
    for name, p in parts.named_parameters():
        p.copy_(average[name])
    save_model(model, out, torch.float16)
    for name, p in parts.named_parameters():
        p.copy_(current[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--autoencoder", type=Path, required=True, help="trained weights")
    parser.add_argument("--start", type=Path, help="weights to go on from, instead of from nothing")
    parser.add_argument("--data", type=Path, required=True, help="folder of encode_dataset.py")
    parser.add_argument("--out", type=Path, required=True, help="weights, .safetensors")
    parser.add_argument("--minutes", type=float, default=66, help="of computing, the whole run")
    parser.add_argument("--clips", type=int, default=1, help="clips per step and worker")
    parser.add_argument("--copies", type=int, default=2,
                        help="noised copies of each block of a clip, on one history")  # fmt: skip
    parser.add_argument("--lone", type=int, default=20, help="lone blocks per step and worker")
    parser.add_argument("--lone-share", type=float, default=0.4, help="of the loss")
    parser.add_argument("--lone-first", type=float, default=0.33,
                        help="share of the run that trains lone blocks only")  # fmt: skip
    parser.add_argument("--blocks", type=int, default=10, help="blocks of a clip")
    parser.add_argument("--subject-weight", type=float, default=3.0)
    parser.add_argument("--back-weight", type=float, default=16.0,
                        help="of what came back into view")  # fmt: skip
    parser.add_argument("--shift", type=float, default=3.0, help="of the noise levels drawn")
    parser.add_argument("--tours", type=float, default=0.3, help="share of tours")
    parser.add_argument("--visits", type=float, default=0.0, help="share of visits to places")
    parser.add_argument("--whole", type=float, default=0.1,
                        help="share of visits with a history of whole blocks")  # fmt: skip
    parser.add_argument("--reading", type=float, default=0.02,
                        help="weight of attention to what has to be recalled")  # fmt: skip
    parser.add_argument("--foreign", type=float, default=0.1, help="share of foreign histories")
    parser.add_argument("--doubles", type=float, default=0.6,
                        help="share of histories that show the wrong shape at times")  # fmt: skip
    parser.add_argument("--lr", type=float, default=3e-3, help="Muon's; AdamW's is half")
    parser.add_argument("--decay", type=float, default=0.6, help="share of the run, at the end")
    parser.add_argument("--save", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--workers", type=int, default=2, help="one-thread processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    team.run(args.workers, train, args)


if __name__ == "__main__":
    main()
