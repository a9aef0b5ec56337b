"""The reference rollout: PackForcing in plain torch, the oracle of the runtime.

Written for reading, not for speed: the history is a list of blocks, and every block's context is
gathered from it again. One block is a few denoising calls conditioned on the history, a commit
(the call at t = 0 that yields the block's clean keys and values) and, beyond the sink, a mid pass
(the same context, the block's compressed tokens). Then the blocks to read next are selected.

Under the commit "last-step" the keys, values and queries of a block's last denoising step take the
place of the call at t = 0. Blocks that are given have no such step, so the call commits them: those
of a clip, the first of a rollout after a restart, and recent ones that are recomputed.

Where the policy restarts, the last block of a rollout is committed twice: once more as the first
of the next.
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
from packforcing.sampler import advance, denoising_steps
from packforcing.selection import affinity, likeness, select, selects_at_first_step
from packforcing.transformer import KV, Rope, patchify, unpatchify

Noise = Callable[[int, int], np.ndarray]  # (block, step) to float32 [N, P]
Call = Callable[..., tuple[Tensor, list[KV], Tensor, Tensor]]  # `forward` on a context


@dataclass
class PastBlock:
    """A committed block: its keys and values at full resolution and compressed."""

    index: int  # in its scene
    full: list[KV]
    compressed: list[KV]
    pooled_key: np.ndarray | None = None  # [L, H, d], of the compressed tokens
    clean: Tensor | None = None  # [1, N, P], from which a prompt switch may recompute `full`


@dataclass
class GeneratedBlock:
    """The results of one block of a rollout."""

    index: int
    latents: Tensor  # [B_f, C, h, w]
    frames: Tensor  # [4 B_f, 3, H, W] in 0..1; a scene's first block includes the trimmed ones
    read: list[int]  # indices of the archived blocks in context
    first_flow: Tensor | None  # [N, P], of the first step; None for a block of the clip
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
) -> Iterator[GeneratedBlock]:
    """Generate blocks for a prompt.

    Args:
        model: The model, in evaluation mode.
        text: The prompt's embedding, [1, rows, text_dim].
        blocks: Number of blocks.
        noise: Called with (block, step), returns float32 [N, P].
        seed: For the selection rule "random".
        clip: Clean latents [blocks B_f, C, h, w] that begin the video; they are committed, not
            generated.
        replay: Per block, the archived blocks that it reads, instead of selecting them.
        switches: By the first block that follows it, another embedding and what happens to the
            history, as `packforcing.prompts` defines it.

    Yields:
        One block after the other.
    """
    config, policy = model.config, model.config.policy
    switches = {0: (text, "keep"), **(switches or {})}
    state = model.autoencoder.decoder_state()
    history: list[PastBlock] = []  # of the scene that began with block `scene`
    selected: list[int] = []
    scene = generated = 0  # blocks that the scene's rollout generated

    for index in range(blocks):
        effect = None
        if index in switches:
            text, effect = switches[index]
            cross = model.transformer.cross_kv(text)
        if effect == "cut":
            state, history, selected, scene = model.autoencoder.decoder_state(), [], [], index
            generated = 0
        if replay is not None:
            selected = [block - scene for block in replay[index]]
        if effect == "recompute":
            recompute_recent(model, cross, history, selected)
        call, start = denoiser_call(model, cross, history, selected)

        first_flow = last_step = None
        if clip is not None and (index + 1) * config.block_frames <= len(clip):
            latents = clip[index * config.block_frames : (index + 1) * config.block_frames]
            x = patchify(latents[None], config.patch)
        else:
            x = torch.from_numpy(noise(index, 0))[None]
            for step, (timestep, now, then) in enumerate(denoising_steps(config, generated)):
                flow, full, step_query, _ = call(x, timestep, block_positions(config, start))
                first_flow = flow[0] if step == 0 else first_flow
                selects = step == 0 and selects_at_first_step(policy, effect is not None)
                if selects and replay is None:
                    selected = select_mid_blocks(
                        config, history, step_query[0].numpy(), seed, index
                    )
                    call, start = denoiser_call(model, cross, history, selected)
                if policy.commit == "last-step":
                    last_step = full, step_query
                fresh = None
                if config.sampler == "renoise" and then > 0:
                    fresh = torch.from_numpy(noise(index, step + 1))[None]
                x = advance(config, x, flow, fresh, now, then)
            generated += 1

        latents, read = unpatchify(x, config.grid, config.patch), [scene + mid for mid in selected]
        block, frames, query, state = commit_block(
            model, call, start, len(history), latents, state, last_step
        )
        if index + 1 < blocks and len(history) + 1 == policy.restart:
            state, history, selected, scene = model.autoencoder.decoder_state(), [], [], index
            generated = 0
            call, start = denoiser_call(model, cross, history, selected)
            again = encode_first(model, latents, frames)
            block, later, query, state = commit_block(model, call, start, 0, again, state)
            trimmed = config.trimmed_frames
            frames = torch.cat((frames[:trimmed], later[trimmed:]))
        yield GeneratedBlock(index, latents[0], frames, read, first_flow, query)

        history.append(block)
        selected = select_mid_blocks(config, history, query, seed, index)
        drop_unread(config, history)


def denoiser_call(
    model: Model, cross: list[KV], history: list[PastBlock], selected: list[int]
) -> tuple[Call, float]:
    """Return a function that calls the transformer on the next block, and the block's position."""
    context, context_rope, start = gather_context(model.config, history, selected)
    return partial(call_transformer, model, cross, context, context_rope), start


def commit_block(
    model: Model,
    call: Call,
    start: float,
    index: int,
    latents: Tensor,
    state: State,
    last_step: tuple[list[KV], Tensor] | None = None,
) -> tuple[PastBlock, Tensor, np.ndarray, State]:
    """Commit a block of a scene.

    Args:
        model: The model.
        call: Of `denoiser_call`.
        start: Temporal position of the block.
        index: Of the block in its scene.
        latents: Clean, [1, B_f, C, h, w].
        state: Of the decoder, before the block.
        last_step: Keys and values, and mean query [1, L, H, d], of the denoising step that commits
            the block; None: a call at t = 0 does.

    Returns:
        The committed block, its frames [4 B_f, 3, H, W], its mean query [L, H, d], and the
        decoder's state after it.
    """
    config, policy = model.config, model.config.policy
    x = patchify(latents, config.patch)
    if last_step is None:
        _, full, query, _ = call(x, 0.0, block_positions(config, start))
    else:
        full, query = last_step
    frames = []
    for latent in latents[0]:
        decoded, state = model.autoencoder.decode_frame(latent[None], state)
        frames.append(decoded)
    block = PastBlock(index, full, [], clean=x)
    if policy.mid and block.index >= policy.sink:
        tokens, extra = model.compressor(latents, torch.cat(frames)[None])
        if policy.branches != "both":  # the other one adds nothing
            (tokens if policy.branches == "high" else extra).zero_()
        centers = compressed_positions(config, start, config.block_frames)
        _, block.compressed, _, key = call(tokens, 0.0, centers, extra)
        block.pooled_key = key[0].numpy()
    return block, torch.cat(frames), query[0].numpy(), state


def encode_first(model: Model, latents: Tensor, frames: Tensor) -> Tensor:
    """Encode the first latent frame of a block again, as the first frame of a video.

    Args:
        model: The model.
        latents: The block, [1, B_f, C, h, w].
        frames: Its pixel frames, [4 B_f, 3, H, W]; the last of its first latent frame is encoded.

    Returns:
        The block with that first latent frame, [1, B_f, C, h, w].
    """
    config = model.config
    last = frames[TEMPORAL_FACTOR - 1].expand(TEMPORAL_FACTOR, -1, -1, -1)
    state = model.autoencoder.encoder_state(config.height, config.width)
    first, _ = model.autoencoder.encode_frame(last, state)
    return torch.cat((first[None], latents[:, 1:]), 1)


def call_transformer(
    model: Model,
    cross: list[KV],
    context: list[KV],
    context_rope: Rope,
    tokens: Tensor,
    timestep: float,
    positions: np.ndarray,
    extra: Tensor | None = None,
) -> tuple[Tensor, list[KV], Tensor, Tensor]:
    """Call the transformer on tokens [1, n, P] at positions [n, 3]."""
    if extra is None:
        extra = tokens.new_zeros(1, tokens.shape[1], model.config.dim)
    time = torch.tensor([timestep], dtype=torch.float32)
    return model.transformer(
        tokens, extra, time, cross, rope_tensors(model.config, positions), context, context_rope
    )


def recompute_recent(
    model: Model, cross: list[KV], history: list[PastBlock], selected: list[int]
) -> None:
    """Compute the recent blocks' keys and values again under another prompt.

    Each block reads the blocks before it in the context of the next block.
    """
    sink, archived = model.config.policy.sink, blocks_outside_window(model.config, history)
    before = [*history[:sink], *(history[index] for index in selected)]
    for block in history[sink + len(archived) :]:
        context, context_rope, start = context_of(model.config, before, selected, block.index)
        assert block.clean is not None
        at = block_positions(model.config, start)
        block.full = call_transformer(model, cross, context, context_rope, block.clean, 0.0, at)[1]
        before.append(block)


def select_mid_blocks(
    config: Config, history: list[PastBlock], query: np.ndarray, seed: int, index: int
) -> list[int]:
    """Select the archived blocks to read after the video's block `index`, oldest first."""
    archived = blocks_outside_window(config, history)
    if not config.policy.mid or not archived:
        return []
    keys = np.stack([block.pooled_key for block in archived if block.pooled_key is not None])
    indices = np.array([block.index for block in archived])
    newest_key = history[-1].pooled_key
    if config.policy.selection == "likeness" and newest_key is not None:
        scores = likeness(newest_key, keys)
    else:
        scores = affinity(query, keys)
    return select(config.policy, indices, scores, seed, index).tolist()


def gather_context(
    config: Config, history: list[PastBlock], selected: list[int]
) -> tuple[list[KV], Rope, float]:
    """Gather the context of the next block: sink, selected mid blocks, recent blocks."""
    sink = history[: config.policy.sink]
    recent = history[config.policy.sink + len(blocks_outside_window(config, history)) :]
    blocks = [*sink, *(history[index] for index in selected), *recent]
    return context_of(config, blocks, selected, len(history))


def context_of(
    config: Config, blocks: list[PastBlock], selected: list[int], index: int
) -> tuple[list[KV], Rope, float]:
    """Assemble the context that block `index` of a scene reads.

    Args:
        config: The model.
        blocks: The blocks in context, in time order.
        selected: Indices of those that are read in compressed form.
        index: Of the block that reads them.

    Returns:
        Keys and values per layer, their RoPE tables, and the temporal position of the block.
    """
    frames, span = config.block_frames, config.mid_span
    packed = config.policy.positions == "packed"
    parts: list[list[KV]] = []
    positions = [np.zeros((0, 3))]
    start = 0.0
    for block in blocks:
        start = start if packed else float(block.index * frames)
        full_resolution = block.index not in selected
        parts.append(block.full if full_resolution else block.compressed)
        positions.append(
            block_positions(config, start)
            if full_resolution
            else compressed_positions(config, start, span)
        )
        start += frames if full_resolution else span
    start = start if packed else float(index * frames)
    empty = torch.zeros(1, config.heads, 0, config.head_dim)
    context = [
        (
            torch.cat([empty, *(part[layer][0] for part in parts)], 2),
            torch.cat([empty, *(part[layer][1] for part in parts)], 2),
        )
        for layer in range(config.layers)
    ]
    return context, rope_tensors(config, np.concatenate(positions)), start


def drop_unread(config: Config, history: list[PastBlock]) -> None:
    """Drop full-resolution keys, values and latents that no later block reads."""
    for block in blocks_outside_window(config, history):
        block.full, block.clean = [], None


def blocks_outside_window(config: Config, history: list[PastBlock]) -> list[PastBlock]:
    """Return the blocks that are neither sink nor recent, readable in compressed form alone."""
    sink, recent = config.policy.sink, config.policy.recent
    return history[sink : max(sink, len(history) - recent)]


def rope_tensors(config: Config, positions: np.ndarray) -> Rope:
    cos, sin = rope_table(positions, config.head_dim)
    return torch.from_numpy(cos), torch.from_numpy(sin)
