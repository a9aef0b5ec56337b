"""Make blocks on bound graphs, one after the other: the steady state of the runtime.

Steps read the history; commit changes it, and so does a prompt switch between two blocks.
`packforcing.runtime.cache` has the protocol.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from packforcing.config import Config
from packforcing.errors import BackendError, ConfigError
from packforcing.prompts import History
from packforcing.rope import block_positions, compressed_positions, rope_table
from packforcing.runtime.archive import Archive
from packforcing.runtime.backends import Backend, LoadedGraph
from packforcing.runtime.buffers import Arrays, Buffers
from packforcing.runtime.cache import Cache
from packforcing.runtime.device import Array
from packforcing.runtime.encoder import bind_encoder
from packforcing.sampler import advance, denoising_steps, draw_noise
from packforcing.selection import affinity, select, selects_at_first_step


class Hooks:
    """Calls a video's methods while its blocks are made, as long as there is a video."""

    def __init__(self) -> None:
        self._before_call: Callable[[], Callable[[], None] | None] = _nothing
        self._after_step: Callable[[], Callable[[int, int], None] | None] = _nothing

    def connect(
        self, before_call: Callable[[], None], after_step: Callable[[int, int], None]
    ) -> None:
        """Take two methods, to be called as long as their object lives.

        Args:
            before_call: Called before each call of a graph. What it raises ends the video.
            after_step: Called with each denoising step, from 0 on, and their number.
        """
        # weakly: a video that its user drops is freed at once, with its buffers
        self._before_call = weakref.WeakMethod(before_call)
        self._after_step = weakref.WeakMethod(after_step)

    def disconnect(self) -> None:
        """Call nothing from now on."""
        self._before_call = self._after_step = _nothing

    def before_call(self) -> None:
        if method := self._before_call():
            method()

    def after_step(self, step: int, steps: int) -> None:
        if method := self._after_step():
            method(step, steps)


def _nothing() -> None:
    pass


class Rollout:
    """Makes blocks in order, into `buffers.latents` and `buffers.pixels`.

    Attributes:
        config: The bundle's, with the policy that is followed.
        backend: Runs the graphs.
        device: Where the buffers are.
        buffers: All arrays; allocated once.
        cache: Which block sits where in the context. Counts from the first block of the scene.
        archive: The compressed blocks of the scene.
        scene: The video's block that the scene began with.
        first_generated: The scene's first block that is generated. Those before it are given: a
            start clip's, or the one that a restart shares with the rollout before.
        read: The archived blocks that the last block read, counted in the scene.
        hooks: Called while blocks are made.

    Ablations (`packforcing.evaluation.ablations`) override `compress` and `score`.
    """

    # those of a policy that it follows
    selections: ClassVar[tuple[str, ...]] = ("affinity", "first-step", "recency", "random")
    branches: ClassVar[tuple[str, ...]] = ("both",)

    def __init__(self, config: Config, backend: Backend) -> None:
        """Allocate the buffers and bind the graphs to them.

        Args:
            config: The bundle's, with the policy to follow.
            backend: Runs the graphs.

        Raises:
            BackendError: A device has too little memory.
            ConfigError: The policy is an ablation.
        """
        policy = config.policy
        if policy.selection not in self.selections or policy.branches not in self.branches:
            raise ConfigError(
                f"selection '{policy.selection}' of mid blocks made of {policy.branches} branches "
                "is an ablation: only 'packforcing compare' runs it"
            )
        self.config, self.backend, self.device = config, backend, backend.device
        self.buffers = buffers = Buffers(config, backend.device)
        # positions relative to a block's start: full, compressed in the mid pass, and as read
        self._grid = block_positions(config, 0)
        self._centres = compressed_positions(config, 0, config.block_frames)
        self._read_centres = compressed_positions(config, 0, config.mid_span)
        self._context_positions = np.zeros((config.context_tokens, 3))
        graphs = backend.graphs
        self.hooks = Hooks()
        self._prompt = self._bind(graphs["prompt"], buffers.prompt)
        self._denoise = self._bind(graphs["denoiser"], buffers.denoiser)
        self._compress = self._bind(graphs["compressor"], buffers.compressor)
        self._mid_pass = self._bind(graphs["denoiser"], buffers.mid_pass)
        self._decode = [self._bind(graphs["vae_decoder"], arrays) for arrays in buffers.decoder]
        if buffers.encoder is not None:  # for a policy that restarts
            encoder = graphs["vae_encoder"]
            self.encode = bind_encoder(encoder, buffers.encoder, self.hooks.before_call)

    def _bind(self, graph: LoadedGraph, arrays: Arrays) -> Callable[[], None]:
        hooks, call = self.hooks, graph.bind(arrays)  # not self: nothing here is to be a circle

        def call_with_hook() -> None:
            hooks.before_call()
            call()

        return call_with_hook

    def begin(
        self,
        text: np.ndarray,
        blocks: int | None,
        seed: int,
        folder: Path | None = None,
        archive_limit: int | None = None,
    ) -> None:
        """Begin a new video.

        Args:
            text: Prompt embedding, float32 [1, T, text_dim].
            blocks: Blocks of the video at most; None: no end.
            seed: Of the noise.
            folder: Where an archive lies that memory is not to hold, see `Archive`.
            archive_limit: Blocks that the archive holds at most; None: all.
        """
        self.archive = Archive(self.config, blocks, folder, archive_limit)
        self.seed = seed
        self._switched = False  # whether the next block is the first under another prompt
        self.begin_scene(0)
        self._follow(text)

    def switch(self, text: np.ndarray, history: History) -> None:
        """Follow another prompt from the next block on.

        Args:
            text: Prompt embedding, float32 [1, T, text_dim].
            history: What later blocks read of the past; `packforcing.prompts` has the rules.
        """
        self._follow(text)
        self._switched = True
        if history == "cut":
            self.begin_scene(self.scene + self.cache.committed)
        elif history == "recompute":
            self._recompute()

    def begin_scene(self, block: int) -> None:
        """Forget the past; cache and archive count blocks from here on.

        Args:
            block: The video's next block.
        """
        self.scene = block
        self.first_generated = 0
        self.archive.clear()
        self.cache = Cache(self.config)
        self.read: list[int] = []
        self._decoded = 0
        self.buffers.clear()

    def _follow(self, text: np.ndarray) -> None:
        self.buffers.text.host[...] = text
        self._prompt()
        self.device.upload(self.buffers.cross)

    def _recompute(self) -> None:
        """Compute the recent blocks' keys and values again, each from the blocks before it."""
        buffers, cache = self.buffers, self.cache
        blocks = cache.rewind()
        for block in blocks:
            self._load(cache.mid_slots())
            self.place()
            buffers.denoiser["tokens"].host[0] = buffers.recent[block % len(buffers.recent)]
            self.call_denoiser(0)
            first = cache.commit()
            assert first is not None
            self.device.copy_tokens(buffers.new, buffers.context, first)
        if blocks:
            self._load(cache.mid_slots())

    @property
    def decoder_state(self) -> Arrays:
        """The state that the decoder's next call reads, by name."""
        arrays = self.buffers.decoder[self._decoded % len(self.buffers.decoder)]
        return {name: array for name, array in arrays.items() if name.startswith("state.")}

    def set_counters(self, scene: int, committed: int, oldest: int, mids: Iterable[int]) -> None:
        """Continue in the middle of a scene; the caller fills the arrays.

        Args:
            scene: The video's block that the scene began with.
            committed: Blocks of the scene so far.
            oldest: The block that was first to take a recent slot, see `Cache`.
            mids: The block in each mid slot.
        """
        self.scene, cache = scene, self.cache
        cache.committed, cache.oldest, cache.mids = committed, oldest, list(mids)
        self._decoded = committed * self.config.block_frames

    def next_block(self, clean: np.ndarray | None = None) -> None:
        """Make the next block and commit it.

        Args:
            clean: Latents [B_f, C, h, w] to take as they are; None generates them.

        Raises:
            BackendError: A graph gave NaN or infinity.
        """
        self.place()
        if clean is None:
            self.denoise()
            np.copyto(self.buffers.latents_as_patches, self.buffers.tokens_as_latents)
        else:
            self.buffers.latents.host[0] = clean
            np.copyto(self.buffers.tokens_as_latents, self.buffers.latents_as_patches)
        self.decode()
        self.commit(generated=clean is None)
        self._switched = False

    def place(self) -> None:
        """Write the position tables and lengths that every call of this block reads."""
        denoiser, mid_pass = self.buffers.denoiser, self.buffers.mid_pass
        layout = self.cache.layout()
        for slot in layout.slots:
            grid = self._read_centres if slot.compressed else self._grid
            rows = self._context_positions[slot.first : slot.first + len(grid)]
            np.add(grid, (slot.start, 0, 0), out=rows)
        self._table(denoiser, "ctx", self._context_positions[: layout.valid])
        self._table(denoiser, "rope", self._grid + np.array((layout.start, 0, 0)))
        self._table(mid_pass, "rope", self._centres + np.array((layout.start, 0, 0)))
        denoiser["kv_len"].host[0] = self.config.block_tokens + layout.valid
        mid_pass["kv_len"].host[0] = self.config.compressed_tokens + layout.valid
        self.device.upload(
            *(denoiser[name] for name in ("ctx_cos", "ctx_sin", "rope_cos", "rope_sin", "kv_len")),
            *(mid_pass[name] for name in ("rope_cos", "rope_sin", "kv_len")),
        )

    def denoise(self) -> None:
        """Go from noise to a clean block in the `tokens` buffer, in a few steps.

        Reads the history only, and brings other mid blocks to the context after the first step
        where the policy selects again.
        """
        config, block = self.config, self.cache.committed
        x = self.buffers.denoiser["tokens"].host
        x[0] = draw_noise(config, self.seed, self.scene + block, 0)
        steps = denoising_steps(config, block - self.first_generated)
        for step, (timestep, now, then) in enumerate(steps):
            flow = self.predict_flow(timestep, f"step {step + 1} of {len(steps)}")
            if step == 0 and selects_at_first_step(config.policy, self._switched):
                self.device.download(self.buffers.denoiser["q_pool"])
                self.select_mids()
                self.place()
            fresh = None
            if config.sampler == "renoise" and then > 0:
                fresh = draw_noise(config, self.seed, self.scene + block, step + 1)
            x[...] = advance(config, x, flow, fresh, now, then)
            self.hooks.after_step(step, len(steps))

    def predict_flow(self, timestep: float, where: str) -> np.ndarray:
        """Predict the velocity of the block in the `tokens` buffer.

        Args:
            timestep: As the model takes it.
            where: The step, for an error's message.

        Returns:
            float32 [1, N, P], a view that the next call overwrites.

        Raises:
            BackendError: It holds NaN or infinity.
        """
        flow = self.buffers.denoiser["flow"]
        self.call_denoiser(timestep)
        self.device.download(flow)
        self._require_finite(flow, "denoiser", where)
        return flow.host

    def compress(self) -> None:
        """Compress the current block to the tokens that the mid pass reads."""
        self._compress()

    def decode(self) -> None:
        """Decode latents to pixels, one latent frame per call, carrying the decoder's state."""
        self.device.upload(self.buffers.latents)
        for _ in range(self.config.block_frames):
            self._decode[self._decoded % len(self._decode)]()
            self._decoded += 1
        self.device.download(self.buffers.pixels)
        self._require_finite(self.buffers.pixels, "vae_decoder", "its pixels")

    def commit(self, generated: bool) -> None:
        """Call at t = 0, compress, and only then change the history: slot, archive, selection.

        Args:
            generated: Whether the denoiser's last call was the block's last step, whose keys,
                values and queries a policy may commit in place of that call's.
        """
        buffers, cache, device = self.buffers, self.cache, self.device
        self.read = sorted(cache.mids)
        if not generated or self.config.policy.commit == "clean":
            self.call_denoiser(0)
        device.download(buffers.denoiser["q_pool"])
        self._require_finite(buffers.denoiser["q_pool"], "denoiser", "its commit")
        block, compressed = cache.committed, buffers.new_compressed
        if cache.compresses():
            self.compress()
            self._mid_pass()
            pooled_key = buffers.mid_pass["k_pool"]
            device.download(compressed, pooled_key)
            self._require_finite(pooled_key, "denoiser", "its mid pass")
            recent = range(cache.candidates().stop, block)
            self.archive.put(block, compressed.host, pooled_key.host, (*cache.mids, *recent))
        if len(buffers.recent):
            buffers.recent[block % len(buffers.recent)] = buffers.denoiser["tokens"].host[0]
        first = cache.commit()
        if first is not None:
            device.copy_tokens(buffers.new, buffers.context, first)
        self.select_mids()

    def select_mids(self) -> None:
        """Select the archived blocks to read from now on, and bring them to the context."""
        candidates = self.archive.stored(self.cache.candidates())
        chosen = self.select(self.cache.committed - 1, candidates)
        self._load(self.cache.select_mids(chosen.tolist()))

    def _require_finite(self, array: Array, graph: str, where: str) -> None:
        # a sum takes no memory, and that of finite numbers is finite in float64
        if not math.isfinite(array.host.sum(dtype=np.float64)):
            raise BackendError(
                f"block {self.scene + self.cache.committed}, {where}: the graph '{graph}' gave NaN "
                "or infinity; the block is discarded. Start again with another backend or "
                "precision, or find the graph with 'packforcing verify'"
            )

    def _load(self, slots: list[tuple[int, int]]) -> None:
        """Bring archived blocks to the context: pairs of a block and its first token there."""
        compressed = self.buffers.new_compressed
        for block, first in slots:
            compressed.host[...] = self.archive.get(block)
            self.device.upload(compressed)
            self.device.copy_tokens(compressed, self.buffers.context, first)

    def call_denoiser(self, timestep: float) -> None:
        """Run the denoiser on the host's `tokens`."""
        tokens, time = (self.buffers.denoiser[name] for name in ("tokens", "timestep"))
        time.host[0] = timestep
        self.device.upload(tokens, time)
        self._denoise()

    def select(self, block: int, candidates: Sequence[int]) -> np.ndarray:
        """Select the archived blocks to read after a commit.

        Args:
            block: The block that was committed last, counted in the scene.
            candidates: The archived blocks that may be read.

        Returns:
            Blocks out of `candidates`, oldest first.
        """
        policy, scores = self.config.policy, None
        if policy.selection not in ("recency", "random") and len(candidates) > policy.mid:
            scores = self.score(block, candidates)
        return select(policy, np.asarray(candidates), scores, self.seed, self.scene + block)

    def score(self, block: int, candidates: Sequence[int]) -> np.ndarray:
        """Score archived blocks for selection: their affinity to the block committed last."""
        return affinity(self.buffers.denoiser["q_pool"].host, self.archive.keys(candidates))

    def _table(self, arrays: Arrays, name: str, positions: np.ndarray) -> None:
        cos, sin = rope_table(positions, self.config.head_dim)
        arrays[f"{name}_cos"].host[: len(cos)] = cos
        arrays[f"{name}_sin"].host[: len(sin)] = sin
