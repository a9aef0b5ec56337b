"""One pass over a whole clip: who reads whom, and whether what has to be recalled is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from packforcing.config import Config
from packforcing.model import Model
from packforcing.rope import block_positions, compressed_positions, rope_table
from packforcing.transformer import patchify, rotate


@dataclass
class Layout:
    """Who reads whom in one pass over G blocks, for one size of sink and recent.

    Every block has `groups` groups of `size` tokens: group 0 holds the clean block and its
    compressed tokens, each other group a noised copy (padded with tokens that do nothing).
    """

    blocks: int
    groups: int
    size: int
    tokens: int
    sink: int
    recent: int
    rope: tuple[Tensor, Tensor]  # [G, 1, 1, size, d / 2]
    mask: Tensor  # bool [G, groups * size, keys]
    source: Tensor  # int64 [G, keys], the block that a key is of; G where it is not of the past

    @classmethod
    def make(cls, config: Config, blocks: int, copies: int, sink: int, recent: int) -> Layout:
        n, m = config.block_tokens, config.compressed_tokens
        size, groups = n + m, 1 + copies
        rope = rope_tables(config, config.block_frames * np.arange(blocks))
        source = torch.full((blocks, (sink + recent) * n + blocks * m + groups * size), blocks)
        mask = torch.zeros(blocks, groups * size, (sink + recent) * n + blocks * m + groups * size,
                           dtype=torch.bool)  # fmt: skip
        for i in range(blocks):
            for j in range(sink):
                mask[i, :, j * n : (j + 1) * n] = j < i
                source[i, j * n : (j + 1) * n] = j
            for j in range(1, recent + 1):
                at = (sink + j - 1) * n
                mask[i, :, at : at + n] = i - j >= sink
                source[i, at : at + n] = max(i - j, 0)
            for j in range(sink, i - recent):
                at = (sink + recent) * n + j * m
                mask[i, :, at : at + m] = True
                source[i, at : at + m] = j
            own = (sink + recent) * n + blocks * m
            for g in range(groups):
                a = g * size
                mask[i, a : a + n, own + a : own + a + n] = True
                mask[i, a + n : a + size, own + a + n : own + a + size] = True
        return cls(blocks, groups, size, n, sink, recent, rope, mask, source)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, reading: Reading | None = None
    ) -> Tensor:
        """q, k, v [B G groups, H, size, d]; bias, the mask for all B. Returns what q is."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, self.blocks, self.groups))  # [B, G, groups, H, size, d]

        q, k, v = split(q), split(k), split(v)
        if reading:
            reading.select(self, q, k)
        q, k = rotate(q, self.rope), rotate(k, self.rope)
        queries, keys = q.transpose(2, 3).flatten(0, 1).flatten(2, 3), self._read(k)
        if reading:
            reading.attend(self, queries, keys)
        out = F.scaled_dot_product_attention(queries, keys, self._read(v), bias)
        out = out.unflatten(2, (self.groups, self.size)).transpose(1, 2)
        return out.flatten(0, 1)

    def _read(self, x: Tensor) -> Tensor:
        """Keys or values [B, G, groups, H, size, d] to what a block reads, [B G, H, keys, d]."""
        full, small = x[:, :, 0, :, : self.tokens], x[:, :, 0, :, self.tokens :]
        shared = [full[:, j] for j in range(self.sink)]
        parts = [part[:, None].expand(-1, self.blocks, -1, -1, -1) for part in shared]
        for j in range(1, self.recent + 1):
            parts.append(F.pad(full[:, :-j], (0, 0, 0, 0, 0, 0, j, 0)))
        middle = small.transpose(1, 2).flatten(2, 3)
        parts.append(middle[:, None].expand(-1, self.blocks, -1, -1, -1))
        parts.append(x.transpose(2, 3).flatten(3, 4))
        return torch.cat(parts, 3).flatten(0, 1)


def rope_tables(config: Config, starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Tables of blocks and their compressed tokens, of blocks that start at `starts`, [G]."""
    places = [
        np.concatenate((block_positions(config, float(start)),
                        compressed_positions(config, float(start), config.block_frames)))
        for start in starts
    ]  # fmt: skip
    tables = [rope_table(place, config.head_dim) for place in places]
    cos, sin = (torch.from_numpy(np.stack(table))[:, None, None] for table in zip(*tables))
    return cos, sin


class Reading:
    """Whether the blocks of a return read the blocks that show the place.

    Two losses: the share of their attention, in head `HEAD` of `LAYERS`, that goes to them; and,
    block against block, the affinity of the selection (`packforcing.selection`) from pure noise,
    which copy 0 is, summed over layers and heads.
    """

    HEAD, LAYERS = 0, (2, 4)

    def __init__(self, needed: Tensor) -> None:
        """`needed` is bool [B, G, G]."""
        self.needed = needed
        self.rows = needed.any(-1)
        self.layer = 0
        self.scores = torch.zeros(())
        self.missed = torch.zeros(())

    def select(self, layout: Layout, q: Tensor, k: Tensor) -> None:
        """Adds a layer's affinities; q and k [B, G, groups, H, size, d], before RoPE."""
        n = layout.tokens
        query, key = q[:, :, 1, :, :n].mean(3), k[:, :, 0, :, n:].mean(3)  # [B, G, H, d]
        score = torch.einsum("bihd,bjhd->bij", query, key) / q.shape[-1] ** 0.5
        self.scores = self.scores + score

    def attend(self, layout: Layout, q: Tensor, k: Tensor) -> None:
        """Adds a layer's loss; q [B G, H, groups size, d] and k [B G, H, keys, d]."""
        if self.layer in self.LAYERS and self.rows.any():
            noisy = torch.arange(layout.size, layout.groups * layout.size)
            noisy = noisy[noisy % layout.size < layout.tokens]  # of all copies
            which = self.rows.flatten()
            logits = q[which, self.HEAD][:, noisy] @ k[which, self.HEAD].mT / q.shape[-1] ** 0.5
            mask = layout.mask[:, noisy].repeat(len(self.needed), 1, 1)[which]
            source = layout.source.repeat(len(self.needed), 1)[which]
            target = F.pad(self.needed, (0, 1)).flatten(0, 1)[which].gather(1, source)[:, None]
            logits = logits.masked_fill(~mask, -torch.inf)
            hit = logits.masked_fill(~(target & mask), -torch.inf).logsumexp(-1)
            self.missed = self.missed + (logits.logsumexp(-1) - hit).mean()
        self.layer += 1

    def loss(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Of attention and of selection."""
        if not self.rows.any():
            return self.missed, self.missed
        past = torch.ones_like(self.needed[0]).tril(-1 - layout.recent)
        target = self.needed & past
        rows = target.any(-1)
        if not rows.any():
            return self.missed / len(self.LAYERS), self.missed * 0
        scores = self.scores.masked_fill(~past, -torch.inf)[rows]
        hit = scores.masked_fill(~target[rows], -torch.inf).logsumexp(-1)
        return self.missed / len(self.LAYERS), (scores.logsumexp(-1) - hit).mean()


def clip_flow(
    model: Model, layout: Layout, clean: Tensor, packed: Tensor, low: Tensor, noisy: Tensor,
    sigma: Tensor, text: Tensor, reading: Reading | None = None,
) -> Tensor:  # fmt: skip
    """Flow of every noised block of whole clips, [B, G, copies, N, P].

    clean [B, G, B_f, C, h, w] latents, the history; packed, the same, what stands compressed in
    the place of each, and low [B, G, N_c, P], its low branch; noisy [B, G, copies, N, P]; sigma
    [B, G, copies]; text [B, G, T, text_dim].
    """
    config, transformer = model.config, model.transformer
    n, m = config.block_tokens, config.compressed_tokens
    tokens = patchify(clean.flatten(0, 1), config.patch).unflatten(0, clean.shape[:2])
    first = torch.cat((tokens, low), 2)[:, :, None]
    x = torch.cat((first, F.pad(noisy, (0, 0, 0, m))), 2).flatten(0, 2)
    high = model.compressor.high_branch(packed.flatten(0, 1)).unflatten(0, clean.shape[:2])
    extra = F.pad(high[:, :, None], (0, 0, n, 0, 0, layout.groups - 1)).flatten(0, 2)
    timestep = 1000 * F.pad(sigma, (1, 0)).reshape(-1, 1)
    cross = [(k.repeat_interleave(layout.groups, 0), v.repeat_interleave(layout.groups, 0))
             for k, v in transformer.cross_kv(text.flatten(0, 1))]  # fmt: skip
    bias = layout.mask.repeat(clean.shape[0], 1, 1)[:, None]
    flow = transformer.run(
        x, extra, *transformer.embed_time(timestep), cross,
        lambda q, k, v: layout.attend(q, k, v, bias, reading),
    )  # fmt: skip
    return flow.unflatten(0, (-1, layout.blocks, layout.groups))[:, :, 1:, :n]
