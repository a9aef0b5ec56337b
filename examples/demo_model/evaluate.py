"""Roll out random prompts under the real cache policy, judge the videos, draw a sheet.

The rollout is `packforcing.reference` for many prompts at once: the same calls in the same order.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import msgspec
import numpy as np
import team
import torch
import torch.distributed as dist
from torch import Tensor
from world import film_visits

from packforcing import model_config
from packforcing.autoencoder import MemBlock
from packforcing.config import Config
from packforcing.evaluation import demo_judge
from packforcing.evaluation.policies import comparison_policies
from packforcing.evaluation.recall import Return, Visit, draw_world, judge_recall
from packforcing.model import Model, load_model
from packforcing.rope import block_positions, compressed_positions, rope_table
from packforcing.sampler import advance, denoising_steps, draw_noise
from packforcing.selection import affinity, select, selects_at_first_step
from packforcing.transformer import KV, patchify, unpatchify
from packforcing.words import encode_words, make_prompt, random_attributes, random_tour

PER_BATCH = 6  # prompts rolled out together, per worker


class Verdict(NamedTuple):
    """What the judge says of one video."""

    number: int
    prompt: str
    right: dict[str, bool]
    present: np.ndarray  # bool [T], whether the subject's color is seen
    shaped: np.ndarray  # bool [T], whether its shape is
    returns: list[float]  # loop-closure errors
    revisits: list[Return]  # to places
    grounds: Counter[tuple[str, str]]  # frames of returns by the right ground and the one shown
    early: list[bool]  # whether the second step of each of their blocks predicts the right ground
    stills: np.ndarray  # uint8 [8, H, W, 3]


def rope(config: Config, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(positions, config.head_dim)
    return torch.from_numpy(cos), torch.from_numpy(sin)


@torch.inference_mode()
def roll(
    model: Model,
    prompts: list[list[str]],
    seeds: list[int],
    blocks: int,
    truth: Tensor | None = None,
) -> tuple[Tensor, list[np.ndarray], dict[str, np.ndarray]]:
    """Videos of the prompts, one for each block of each video, and what was selected by what.

    Latents `truth`, [B, T, C, h, w], are the history instead of what was generated.
    Videos are uint8 [B, frames, H, W, 3], without the trimmed first frames; of every block, the
    archived blocks that it read, [B, mid]; and [B, blocks, L, H, d] each, the mean queries of the
    first step and of the commit, "first" and "commit", and the mean "keys"; and the last frame of
    each block as its second step predicts it, "early", uint8 [B, blocks, H, W, 3].
    """
    config, policy = model.config, model.config.policy
    batch, span = len(prompts), config.block_frames
    read = []
    first_queries, commit_queries, early = [], [], []
    decoder = StreamingDecoder(model, batch)
    full: list[list[KV]] = []  # of each block, per layer
    packed: list[list[KV]] = []
    pooled: list[np.ndarray] = []
    chosen = np.zeros((batch, 0), int)
    videos = []
    followed: list[str] = []

    def gather() -> tuple[list[KV], tuple[Tensor, Tensor], float]:
        """What the next block reads, and its position."""
        index = len(full)
        sink = list(range(min(policy.sink, index)))
        recent = list(range(max(policy.sink, index - policy.recent), index))
        places, start = [np.zeros((0, 3))], 0.0
        for kind, count in (("full", len(sink)), ("mid", chosen.shape[1]), ("full", len(recent))):
            for _ in range(count):
                whole = kind == "full"
                width = float(span) if whole else config.mid_span
                places.append(
                    block_positions(config, start) if whole
                    else compressed_positions(config, start, width)
                )  # fmt: skip
                start += width
        context_rope = rope(config, np.concatenate(places))
        context = []
        for layer in range(config.layers):
            pair = []
            for side in (0, 1):
                parts = [full[i][layer][side] for i in sink]
                parts += [
                    torch.stack([packed[i][layer][side][b] for b, i in enumerate(column)])
                    for column in chosen.T
                ]
                parts += [full[i][layer][side] for i in recent]
                empty = torch.zeros(batch, config.heads, 0, config.head_dim)
                pair.append(torch.cat([empty, *parts], 2))
            context.append((pair[0], pair[1]))
        return context, context_rope, start

    def select_by(query: Tensor) -> np.ndarray:
        """Blocks to read after the last one, [B, mid], by a mean query [B, L, H, d]."""
        if not policy.mid:
            return np.zeros((batch, 0), int)
        candidates = np.arange(policy.sink, max(policy.sink, len(full) - policy.recent))
        scores: list = [None] * batch
        if len(candidates):
            keys = np.stack([pooled[i] for i in candidates], 1)  # [B, blocks, L, H, d]
            scores = [affinity(query[b].numpy(), keys[b]) for b in range(batch)]
        return np.stack([
            select(policy, candidates, scores[b], seeds[b], len(full) - 1) for b in range(batch)
        ])  # fmt: skip

    def call(
        cross: list[KV], context: list[KV], context_rope: tuple[Tensor, Tensor], tokens: Tensor,
        timestep: float, positions: np.ndarray, extra: Tensor | None = None,
    ) -> tuple[Tensor, list[KV], Tensor, Tensor]:  # fmt: skip
        extra = torch.zeros(*tokens.shape[:2], config.dim) if extra is None else extra
        return model.transformer(
            tokens, extra, torch.full((batch,), float(timestep)), cross, rope(config, positions),
            context, context_rope,
        )  # fmt: skip

    for index in range(blocks):
        now_followed = [prompt[index] for prompt in prompts]
        changed = np.array([now != before for now, before in zip(now_followed, followed)], bool)
        if now_followed != followed:
            followed = now_followed
            text = np.concatenate([encode_words(prompt, config) for prompt in followed])
            cross = model.transformer.cross_kv(torch.from_numpy(text))
        context, context_rope, start = gather()

        def noise(step, index=index):
            drawn = [draw_noise(config, seed, index, step) for seed in seeds]
            return torch.from_numpy(np.stack(drawn))

        places_now = block_positions(config, start)
        x = noise(0)
        for step, (timestep, now, then) in enumerate(denoising_steps(config, index)):
            flow, _, query, _ = call(cross, context, context_rope, x, timestep, places_now)
            if step == 0:
                first_queries.append(query)
            if step == 1:  # the first that reads what was selected for another prompt
                state = [*decoder.state]
                guess = decoder(unpatchify(x - now * flow, config.grid, config.patch))[:, -1]
                early.append((guess * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
                decoder.state = state
            again = np.array([selects_at_first_step(policy, new) for new in changed])
            if step == 0 and again.any():
                chosen = np.where(again[:, None], select_by(query), chosen)
                context, context_rope, start = gather()
            x = advance(config, x, flow, noise(step + 1) if then else None, now, then)
        latents = unpatchify(x, config.grid, config.patch)
        state = [*decoder.state]
        shown = pixels = decoder(latents)
        if truth is not None:  # the history is not what was generated
            latents, decoder.state = truth[:, span * index : span * (index + 1)], state
            pixels, x = decoder(latents), patchify(latents, config.patch)
        _, new, query, _ = call(cross, context, context_rope, x, 0.0, places_now)
        full.append(new)
        tokens, extra = model.compressor(latents, pixels)
        centers = compressed_positions(config, start, span)
        _, small, _, key = call(cross, context, context_rope, tokens, 0.0, centers, extra)
        packed.append(small)
        pooled.append(key.numpy())
        videos.append((shown * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2))

        commit_queries.append(query)
        read.append(chosen)
        chosen = select_by(query)
    pools = {
        "first": torch.stack(first_queries, 1).numpy(),
        "commit": torch.stack(commit_queries, 1).numpy(),
        "keys": np.stack(pooled, 1),
        "early": torch.stack(early, 1).numpy(),
    }
    return torch.cat(videos, 1)[:, config.trimmed_frames :], read, pools


@torch.inference_mode()
def film(model: Model, prompts: list[list[str]]) -> Tensor:
    """Latents [B, T, C, h, w] of drawn videos that follow prompts."""
    pictures = [film_visits(np.random.default_rng(0), each)[0] for each in prompts]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 1, 4, 2, 3).contiguous()
    return torch.cat([model.compressor.encode(video[None].float() / 255) for video in pixels])


class StreamingDecoder:
    """The autoencoder's decoder, latent frame by latent frame, for many videos at once."""

    def __init__(self, model: Model, batch: int) -> None:
        self.layers = model.autoencoder.decoder
        self.patch = model.config.vae_patch
        self.state = [s.expand(batch, -1, -1, -1) for s in model.autoencoder.decoder_state()]

    def __call__(self, latents: Tensor) -> Tensor:
        """[B, T, C, h, w] to [B, 4T, 3, H, W] in 0..1."""
        batch, x, state = latents.shape[0], latents.flatten(0, 1), iter(self.state)
        after = []
        for layer in self.layers:
            if isinstance(layer, MemBlock):
                clip = x.unflatten(0, (batch, -1))
                past = torch.cat((next(state)[:, None], clip[:, :-1]), 1)
                after.append(clip[:, -1])
                x = layer(x, past.flatten(0, 1))
            else:
                x = layer(x)
        self.state = after
        x = torch.nn.functional.pixel_shuffle(x, self.patch).clamp(0, 1)
        return x.unflatten(0, (batch, -1))


def work(rank: int, args: argparse.Namespace) -> None:
    config = model_config("demo")
    if args.timesteps:
        config = msgspec.structs.replace(config, timesteps=tuple(args.timesteps))
    if args.shift:
        config = msgspec.structs.replace(config, shift=args.shift)
    if args.sampler:
        config = msgspec.structs.replace(config, sampler=args.sampler)
    policy = comparison_policies(config)[args.policy]
    config = msgspec.structs.replace(config, policy=policy)
    model = load_model(config, args.weights)
    model.autoencoder.requires_grad_(False)
    rng = np.random.default_rng(args.seed)
    draw = random_tour if args.tours else random_attributes
    prompts = [make_prompt(**draw(rng)) for _ in range(args.prompts)]
    blocks = config.blocks(config.frames(args.seconds))
    worlds: list[list[Visit]] = []
    if args.recall:
        worlds = [draw_world(args.seed + number, blocks) for number in range(args.prompts)]
        prompts = [world[0].prompt for world in worlds]
    begun, results = time.monotonic(), []
    for first in range(rank * PER_BATCH, args.prompts, args.workers * PER_BATCH):
        numbers = list(range(first, min(first + PER_BATCH, args.prompts)))
        frames = config.frames(args.seconds)
        schedules = [
            [visit.prompt for visit in worlds[i] for _ in range(visit.blocks)] if worlds
            else [prompts[i]] * blocks for i in numbers
        ]  # fmt: skip
        truth = film(model, schedules) if args.true_history else None
        videos, read, pools = roll(model, schedules, numbers, blocks, truth)
        if args.pools:
            np.savez(args.pools.with_suffix(f".{first}.npz"), numbers=args.seed + np.array(numbers),
                     **pools)  # fmt: skip
        for i, video in zip(numbers, videos[:, :frames].numpy()):
            words = set(prompts[i].split())
            seen = demo_judge.read_words(video)
            present, shaped = (
                np.array([word in words for word in seen[kind]]) for kind in ("color", "shape")
            )
            right = demo_judge.matches(prompts[i], video, seen)
            returns = demo_judge.loop_closure(prompts[i], video)
            stills = video[:: max(1, frames // 8)][:8]
            revisits, confused, early = list[Return](), Counter[tuple[str, str]](), list[bool]()
            if worlds:
                mids = [blocks[i - first].tolist() for blocks in read]
                grounds = [str(ground) for ground in seen["ground"]]
                revisits = judge_recall(config, worlds[i], grounds, mids)
                for visit in worlds[i]:
                    if visit.first is not None:
                        start = visit.block * config.block_pixel_frames - config.trimmed_frames
                        stop = start + visit.blocks * config.block_pixel_frames
                        confused.update((visit.ground, shown) for shown in grounds[start:stop])
                        guesses = pools["early"][i - first, visit.block :][: visit.blocks]
                        early += [
                            demo_judge.read_scene(guess).ground == visit.ground for guess in guesses
                        ]
                stills = video[[
                    min(config.block_pixel_frames * (visit.block + visit.blocks) - 6, frames - 1)
                    for visit in worlds[i] if visit.place
                ]]  # fmt: skip
            results.append(
                Verdict(
                    i,
                    prompts[i],
                    right,
                    present,
                    shaped,
                    returns,
                    revisits,
                    confused,
                    early,
                    stills,
                )
            )
    everyone: list = [None] * args.workers
    dist.gather_object(results, everyone if rank == 0 else None)
    if rank == 0:
        report(
            sorted(itertools.chain(*everyone), key=lambda r: r.number),
            config,
            args,
            time.monotonic() - begun,
        )


def report(
    results: list[Verdict], config: Config, args: argparse.Namespace, seconds: float
) -> None:
    """Prints the shares of videos that are right and draws the first 24 as a sheet."""
    steps = f"{config.sampler}, {len(config.timesteps)} steps, shift {config.shift}"
    shares = {kind: np.mean([r.right[kind] for r in results])
              for kind in ("color", "ground", "both", "shape")}  # fmt: skip
    print(f"{args.weights.name}, {len(results)} prompts, {args.seconds} s, {steps}: "
          + ", ".join(f"{kind} {share:.2f}" for kind, share in shares.items())
          + f" ({seconds:.0f} s)")  # fmt: skip
    print(f"frames with the right shape: {np.mean([r.shaped for r in results]):.3f}")
    if args.tours:
        errors = [error for r in results for error in r.returns]
        mean = f"{np.mean(errors):.3f}" if errors else "unknown"
        print(f"{len(errors)} returns in {sum(bool(r.returns) for r in results)} of the tours, "
              f"loop-closure error {mean}")  # fmt: skip
    if args.recall:
        shares = [np.mean([v.share for v in r.revisits if v.scored]) for r in results]
        revisits = [visit for r in results for visit in r.revisits]
        print(f"recall under {args.policy}: {np.mean(shares):.3f} "
              f"(standard error {np.std(shares) / len(shares) ** 0.5:.3f}) of "
              f"{sum(visit.scored for visit in revisits)} of {len(revisits)} returns; retrieved "
              f"{np.mean([visit.retrieved for visit in revisits]):.3f}", flush=True)  # fmt: skip
        together = sum((r.grounds for r in results), Counter[tuple[str, str]]())
        print("the second step of their blocks predicts the right ground: "
              f"{np.mean([right for r in results for right in r.early]):.3f}")  # fmt: skip
        wrong = Counter({pair: n for pair, n in together.items() if len(set(pair)) > 1})
        print(f"{wrong.total()} of {together.total()} frames wrong: " + ", ".join(
            f"{ground} as {shown} {count}" for (ground, shown), count in wrong.most_common(6)
        ))  # fmt: skip
    frames = {"color": [r.present for r in results], "shape": [r.shaped for r in results]}
    for what, seen in frames.items():
        parts = np.array_split(np.stack(seen).mean(0), 10)
        print(f"{what} right, by tenth: " + " ".join(f"{part.mean():.2f}" for part in parts))
    if args.list:
        for r in results:
            verdicts = (f"{kind}:{'yes' if ok else 'NO'}" for kind, ok in r.right.items())
            print(" ".join(verdicts), r.prompt)
    if args.sheet:
        rows = []
        for r in results[:24]:
            row = np.pad(np.concatenate(list(r.stills), 1), ((16, 0), (0, 0), (0, 0)))
            wrong = " ".join(kind for kind, ok in r.right.items() if not ok)
            label = f"{r.prompt}  {f'wrong: {wrong}' if wrong else ''}"
            ink = (255, 120, 120) if not r.right["both"] else (255, 255, 255)
            cv2.putText(row, label, (4, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)
            rows.append(row)
        if len(rows) > 12:
            rows = [np.concatenate(pair, 1) for pair in zip(rows[::2], rows[1::2])]
        cv2.imwrite(str(args.sheet), np.concatenate(rows)[..., ::-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--timesteps", type=float, nargs="+", help="instead of the preset's")
    parser.add_argument("--shift", type=float, help="instead of the preset's")
    parser.add_argument("--sampler", choices=("euler", "renoise"), help="instead of the preset's")
    parser.add_argument("--tours", action="store_true", help="prompts of tours; loop closure")
    parser.add_argument("--recall", action="store_true", help="worlds of visits; recall")
    parser.add_argument("--true-history", action="store_true",
                        help="of worlds: blocks read what was drawn, not generated")  # fmt: skip
    parser.add_argument("--pools", type=Path, help="files of mean queries and keys, a batch each")
    parser.add_argument("--policy", default="packforcing", help="of packforcing compare")
    parser.add_argument("--sheet", type=Path, help="PNG of the first 24 videos, 8 frames each")
    parser.add_argument("--list", action="store_true", help="print the verdict of each prompt")
    parser.add_argument("--workers", type=int, default=2, help="one-thread processes")
    args = parser.parse_args()
    team.run(args.workers, work, args)


if __name__ == "__main__":
    main()
