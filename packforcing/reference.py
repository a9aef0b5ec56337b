"""The reference rollout: PackForcing in plain torch, the oracle of the runtime.

Written for reading, not for speed: the history is a list of blocks, and the context of every
block is gathered anew from it. One block is `steps` denoising calls that read the history, a
commit (the call at t = 0 that yields the block's clean keys and values) and, beyond the sink,
a mid pass (the same context, the block's compressed tokens), after which the blocks to read
next are selected. Where the policy restarts, the last block of a rollout is committed twice: once
more as the first of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from packforcing.autoencoder import State
from packforcing.config import TEMPORAL_FACTOR, Config
from packforcing.model import Model
from packforcing.prompts import History
from packforcing.rope import block_positions, compressed_positions, rope_table
from packforcing.sampler import advance, schedule
from packforcing.selection import affinity, likeness, select
from packforcing.transformer import KV, Rope, patchify, unpatchify

Noise = Callable[[int, int], np.ndarray]  # (block, step) to float32 [N, P]
Call = Callable[..., tuple[Tensor, list[KV], Tensor, Tensor]]  # `forward` on a context


@dataclass
class Past:
    """A finished block: its keys and values at full resolution and compressed."""

    index: int  # in its scene
    full: list[KV]
    compressed: list[KV]
    pooled_key: np.ndarray | None = None  # [L, H, d], of the compressed tokens
    clean: Tensor | None = None  # [1, N, P]; a prompt switch may recompute `full` from it


@dataclass
class Rolled:
    """What one block of a rollout gave."""

    index: int
    latents: Tensor  # [B_f, C, h, w], as they were made
    frames: Tensor  # [4 B_f, 3, H, W] in 0..1; a scene's first block still has the trimmed ones
    read: list[int]  # the archived blocks in context
    first_flow: Tensor | None  # [N, P], of the first step
    query: np.ndarray  # [L, H, d], mean clean query


@torch.inference_mode()
def rollout(
    model: Model,
    text: Tensor,
    blocks: int,
    noise: Noise,
    *,
    seed: int = 0,
    clip: Tensor | None = None,
    replay: list[list[int]] | None = None,
    switches: Mapping[int, tuple[Tensor, History]] | None = None,
) -> Iterator[Rolled]:
    """Yields `blocks` blocks for the prompt embedding `text` [1, rows, text_dim].

    clip: clean latents [blocks B_f, C, h, w] that begin the video and are committed, not
    generated. replay: the archived blocks each block reads, instead of selecting them. switches:
    by the first block that follows it, another embedding, and what becomes of the history, as
    `packforcing.prompts` defines it.
    """
    config, policy = model.config, model.config.policy
    switches = {0: (text, "keep"), **(switches or {})}
    state = model.autoencoder.decoder_state()
    history: list[Past] = []  # of the scene that began with block `scene`
    chosen: list[int] = []
    scene = 0

    for index in range(blocks):
        effect = None
        if index in switches:
            text, effect = switches[index]
            cross = model.transformer.cross_kv(text)
        if effect == "cut":
            state, history, chosen, scene = model.autoencoder.decoder_state(), [], [], index
        if replay is not None:
            chosen = [block - scene for block in replay[index]]
        if effect == "recompute":
            recompute(model, cross, history, chosen)
        call, start = reading(model, cross, history, chosen)

        first_flow = None
        if clip is not None and (index + 1) * config.block_frames <= len(clip):
            given = clip[index * config.block_frames : (index + 1) * config.block_frames]
            x = patchify(given[None], config.patch)
        else:
            x = torch.from_numpy(noise(index, 0))[None]
            for step, (told, now, then) in enumerate(schedule(config, index - scene)):
                flow, _, asked, _ = call(x, told, block_positions(config, start))
                first_flow = flow[0] if step == 0 else first_flow
                if step == 0 and policy.selection == "first-step" and replay is None:
                    chosen = choose(config, history, asked[0].numpy(), seed, index)
                    call, start = reading(model, cross, history, chosen)
                fresh = None
                if config.sampler == "renoise" and then > 0:
                    fresh = torch.from_numpy(noise(index, step + 1))[None]
                x = advance(config, x, flow, fresh, now, then)

        latents, read = unpatchify(x, config.grid, config.patch), [scene + mid for mid in chosen]
        block, frames, query, state = commit(model, call, start, len(history), latents, state)
        goes_on = index + 1 < blocks and switches.get(index + 1, (text, "keep"))[1] != "cut"
        if goes_on and len(history) + 1 == policy.restart:
            state, history, chosen, scene = model.autoencoder.decoder_state(), [], [], index
            call, start = reading(model, cross, history, chosen)
            again = encode_first(model, latents, frames)
            block, later, query, state = commit(model, call, start, 0, again, state)
            trimmed = config.trimmed_frames
            frames = torch.cat((frames[:trimmed], later[trimmed:]))
        yield Rolled(index, latents[0], frames, read, first_flow, query)

        history.append(block)
        chosen = choose(config, history, query, seed, index)
        forget(config, history)


def reading(
    model: Model, cross: list[KV], history: list[Past], chosen: list[int]
) -> tuple[Call, float]:
    """What calls the transformer on the next block behind this history, and where it starts."""
    context, context_rope, start = gather(model.config, history, chosen)
    return partial(forward, model, cross, context, context_rope), start


def commit(
    model: Model, call: Call, start: float, index: int, latents: Tensor, state: State
) -> tuple[Past, Tensor, np.ndarray, State]:
    """Block `index` of a scene, clean [1, B_f, C, h, w], by the calls that `reading` gives: what is
    to be kept of it, its frames [4 B_f, 3, H, W], its mean query [L, H, d], and the decoder's state
    after it."""
    config, policy = model.config, model.config.policy
    x = patchify(latents, config.patch)
    _, full, query, _ = call(x, 0.0, block_positions(config, start))
    frames = []
    for latent in latents[0]:
        decoded, state = model.autoencoder.decode_frame(latent[None], state)
        frames.append(decoded)
    block = Past(index, full, [], clean=x)
    if policy.mid and block.index >= policy.sink:
        tokens, extra = model.compressor(latents, torch.cat(frames)[None])
        if policy.branches != "both":  # the other one adds nothing
            (tokens if policy.branches == "high" else extra).zero_()
        centres = compressed_positions(config, start, config.block_frames)
        _, block.compressed, _, key = call(tokens, 0.0, centres, extra)
        block.pooled_key = key[0].numpy()
    return block, torch.cat(frames), query[0].numpy(), state


def encode_first(model: Model, latents: Tensor, frames: Tensor) -> Tensor:
    """A block's latents [1, B_f, C, h, w] with the first of them made again, of the last frame that
    it was decoded to, as that of a video which begins with this frame."""
    config = model.config
    last = frames[TEMPORAL_FACTOR - 1].expand(TEMPORAL_FACTOR, -1, -1, -1)
    state = model.autoencoder.encoder_state(config.height, config.width)
    first, _ = model.autoencoder.encode_frame(last, state)
    return torch.cat((first[None], latents[:, 1:]), 1)


def forward(
    model: Model,
    cross: list[KV],
    context: list[KV],
    context_rope: Rope,
    tokens: Tensor,
    timestep: float,
    positions: np.ndarray,
    extra: Tensor | None = None,
) -> tuple[Tensor, list[KV], Tensor, Tensor]:
    """One call of the transformer on tokens [1, n, P] at positions [n, 3]."""
    if extra is None:
        extra = tokens.new_zeros(1, tokens.shape[1], model.config.dim)
    time = torch.tensor([timestep], dtype=torch.float32)
    return model.transformer(
        tokens, extra, time, cross, rope(model.config, positions), context, context_rope
    )


def recompute(model: Model, cross: list[KV], history: list[Past], chosen: list[int]) -> None:
    """The recent blocks' keys and values under another prompt, each from what stands before it
    in the context of the next block."""
    sink, outside = model.config.policy.sink, past_recent(model.config, history)
    before = [*history[:sink], *(history[index] for index in chosen)]
    for block in history[sink + len(outside) :]:
        context, context_rope, start = lay_out(model.config, before, chosen, block.index)
        assert block.clean is not None
        at = block_positions(model.config, start)
        block.full = forward(model, cross, context, context_rope, block.clean, 0.0, at)[1]
        before.append(block)


def choose(
    config: Config, history: list[Past], query: np.ndarray, seed: int, index: int
) -> list[int]:
    """The archived blocks to read after the video's block `index`, oldest first."""
    outside = past_recent(config, history)
    if not config.policy.mid or not outside:
        return []
    keys = np.stack([block.pooled_key for block in outside if block.pooled_key is not None])
    indices = np.array([block.index for block in outside])
    own = history[-1].pooled_key
    if config.policy.selection == "likeness" and own is not None:
        scores = likeness(own, keys)
    else:
        scores = affinity(query, keys)
    return select(config.policy, indices, scores, seed, index).tolist()


def gather(config: Config, history: list[Past], chosen: list[int]) -> tuple[list[KV], Rope, float]:
    """The context of the next block: sink, the chosen mids, recent blocks."""
    sink = history[: config.policy.sink]
    recent = history[config.policy.sink + len(past_recent(config, history)) :]
    blocks = [*sink, *(history[index] for index in chosen), *recent]
    return lay_out(config, blocks, chosen, len(history))


def lay_out(
    config: Config, blocks: list[Past], chosen: list[int], index: int
) -> tuple[list[KV], Rope, float]:
    """The context that block `index` of a scene reads, of blocks in time order, the chosen ones
    compressed: keys and values, their tables, and where the block itself starts."""
    frames, span = config.block_frames, config.mid_span
    packed = config.policy.positions == "packed"
    parts: list[list[KV]] = []
    positions = [np.zeros((0, 3))]
    start = 0.0
    for block in blocks:
        start = start if packed else float(block.index * frames)
        whole = block.index not in chosen
        parts.append(block.full if whole else block.compressed)
        positions.append(
            block_positions(config, start) if whole else compressed_positions(config, start, span)
        )
        start += frames if whole else span
    start = start if packed else float(index * frames)
    empty = torch.zeros(1, config.heads, 0, config.head_dim)
    context = [
        (
            torch.cat([empty, *(part[layer][0] for part in parts)], 2),
            torch.cat([empty, *(part[layer][1] for part in parts)], 2),
        )
        for layer in range(config.layers)
    ]
    return context, rope(config, np.concatenate(positions)), start


def forget(config: Config, history: list[Past]) -> None:
    """Drops full-resolution keys and values that no later block reads, and what they are of."""
    for block in past_recent(config, history):
        block.full, block.clean = [], None


def past_recent(config: Config, history: list[Past]) -> list[Past]:
    """The blocks that are neither sink nor recent: readable in compressed form alone."""
    sink, recent = config.policy.sink, config.policy.recent
    return history[sink : max(sink, len(history) - recent)]


def rope(config: Config, positions: np.ndarray) -> Rope:
    cos, sin = rope_table(positions, config.head_dim)
    return torch.from_numpy(cos), torch.from_numpy(sin)
