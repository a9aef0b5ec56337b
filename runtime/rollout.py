"""One video, block by block, on bound graphs: the steady state of the runtime.

Steps read the history, commit changes it; `packforcing.runtime.cache` has the protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from packforcing.config import Config
from packforcing.rope import block_positions, compressed_positions, rope_table
from packforcing.runtime.backend import Graph
from packforcing.runtime.buffers import Archive, Arrays, Buffers
from packforcing.runtime.cache import Cache
from packforcing.sampler import advance, draw_noise, sigmas
from packforcing.selection import affinity, select

Select = Callable[[int, range], np.ndarray]  # (block just committed, candidates) to selected


class Rollout:
    """Generates blocks in order, into `buffers.latents` and `buffers.pixels`."""

    def __init__(self, config: Config, graphs: dict[str, Graph]) -> None:
        self.config = config
        self.buffers = buffers = Buffers(config)
        self.levels = sigmas(config)
        # positions relative to a block's start: full, compressed in the mid pass, and as read
        self._grid = block_positions(config, 0)
        self._centres = compressed_positions(config, 0, config.block_frames)
        self._read_centres = compressed_positions(config, 0, config.mid_span)
        self._context_positions = np.zeros((config.context_tokens, 3))
        self._prompt = graphs["prompt"].bind(buffers.prompt)
        self._denoise = graphs["denoiser"].bind(buffers.denoiser)
        self._compress = graphs["compressor"].bind(buffers.compressor)
        self._mid_pass = graphs["denoiser"].bind(buffers.mid_pass)
        self._decode = [
            [graphs["vae_decoder"].bind(arrays) for arrays in calls] for calls in buffers.decoder
        ]

    def begin(self, text: np.ndarray, blocks: int, seed: int) -> None:
        """A new video of at most `blocks` blocks for a prompt embedding [1, T, text_dim]."""
        self.cache = Cache(self.config)
        self.archive = Archive(self.config, blocks)
        self.seed = seed
        self.select: Select = self._select
        self._decoded = 0
        for state in self.buffers.decoder_state:
            state[...] = 0
        self.buffers.context[...] = 0
        self.buffers.prompt["text"][...] = text
        self._prompt()

    def next_block(self, clean: np.ndarray | None = None) -> None:
        """Generates a block, or takes `clean` latents [B_f, C, h, w] as they are; commits it."""
        self.place()
        if clean is None:
            self.denoise()
            np.copyto(self.buffers.latents_as_patches, self.buffers.tokens_as_latents)
        else:
            self.buffers.latents[0] = clean
            np.copyto(self.buffers.tokens_as_latents, self.buffers.latents_as_patches)
        self.decode()
        self.commit()

    def place(self) -> None:
        """Writes the position tables and lengths that every call of this block reads."""
        denoiser, mid_pass = self.buffers.denoiser, self.buffers.mid_pass
        layout = self.cache.layout()
        for slot in layout.slots:
            grid = self._read_centres if slot.compressed else self._grid
            rows = self._context_positions[slot.first : slot.first + len(grid)]
            np.add(grid, (slot.start, 0, 0), out=rows)
        self._table(denoiser, "ctx", self._context_positions[: layout.valid])
        self._table(denoiser, "rope", self._grid + np.array((layout.start, 0, 0)))
        self._table(mid_pass, "rope", self._centres + np.array((layout.start, 0, 0)))
        denoiser["kv_len"][0] = self.config.block_tokens + layout.valid
        mid_pass["kv_len"][0] = self.config.compressed_tokens + layout.valid

    def denoise(self) -> None:
        """The few steps from noise to a clean block, in the `tokens` buffer. Reads only."""
        config, block = self.config, self.cache.committed
        x, flow = self.buffers.denoiser["tokens"], self.buffers.denoiser["flow"]
        x[0] = draw_noise(config, self.seed, block, 0)
        for step, (now, then) in enumerate(pairwise(self.levels)):
            self.buffers.denoiser["timestep"][0] = 1000 * now
            self._denoise()
            fresh = None
            if config.sampler == "renoise" and then > 0:
                fresh = draw_noise(config, self.seed, block, step + 1)
            x[...] = advance(config, x, flow, fresh, now, then)

    def decode(self) -> None:
        """Latents to pixels, one latent frame a call, carrying the decoder's state."""
        for frame in range(self.config.block_frames):
            self._decode[self._decoded % 2][frame]()
            self._decoded += 1

    def commit(self) -> None:
        """The call at t = 0, the mid pass, and only then the history: slot, archive, selection."""
        buffers, cache, config = self.buffers, self.cache, self.config
        buffers.denoiser["timestep"][0] = 0
        self._denoise()
        block = cache.committed
        if cache.compresses():
            self._compress()
            self._mid_pass()
            self.archive.put(block, buffers.new_compressed, buffers.mid_pass["k_pool"])
        first = cache.commit()
        if first is not None:
            buffers.context[..., first : first + config.block_tokens, :] = buffers.new
        selected = self.select(block, cache.candidates())
        for chosen, first in cache.read(selected.tolist()):
            kept = self.archive.get(chosen)
            buffers.context[..., first : first + config.compressed_tokens, :] = kept

    def _select(self, block: int, candidates: range) -> np.ndarray:
        policy, scores = self.config.policy, None
        if policy.selection == "affinity" and len(candidates) > policy.mid:
            query = self.buffers.denoiser["q_pool"]
            scores = affinity(query, self.archive.keys(candidates))
        return select(policy, np.asarray(candidates), scores, self.seed, block)

    def _table(self, arrays: Arrays, name: str, positions: np.ndarray) -> None:
        cos, sin = rope_table(positions, self.config.head_dim)
        arrays[f"{name}_cos"][: len(cos)] = cos
        arrays[f"{name}_sin"][: len(sin)] = sin
