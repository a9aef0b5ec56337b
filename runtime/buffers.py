"""Every array of a rollout, allocated once: sizes from the config, names from the contract."""

from __future__ import annotations

import math

import numpy as np

from packforcing.config import Config
from packforcing.runtime.bundle import GraphSpec, contract, decoder_state_shapes

Arrays = dict[str, np.ndarray]


class Buffers:
    """The fixed arrays that graphs read and write, and the history.

    Keys and values of all layers share one array per purpose, [L, 2, 1, H, tokens, d] (keys
    first), so that a commit is one copy; graphs see its per-layer slices by name.
    """

    def __init__(self, config: Config) -> None:
        graphs = contract(config)
        layers, heads, d = config.layers, config.heads, config.head_dim

        def key_values(tokens: int) -> np.ndarray:
            # zeros, not garbage: a NaN beyond the valid part would spread through 0 * NaN
            return np.zeros((layers, 2, 1, heads, tokens, d), np.float32)

        self.context = key_values(config.context_tokens)
        self.new = key_values(config.block_tokens)
        self.new_compressed = key_values(config.compressed_tokens)
        self.cross = key_values(config.text_len)
        self.prompt = {"text": _zeros(graphs["prompt"], "text"), **_named("cross", self.cross)}
        self.compressor = _io(graphs["compressor"])
        shared = {
            **_named("cross", self.cross),
            **_named("ctx", self.context, after=True),
            "ctx_cos": np.ones((config.context_tokens, d // 2), np.float32),
            "ctx_sin": np.zeros((config.context_tokens, d // 2), np.float32),
            "timestep": np.zeros(1, np.float32),
        }
        self.denoiser = _io(
            graphs["denoiser"],
            {**shared, **_named("new", self.new, after=True)},
            N=config.block_tokens,
        )
        self.mid_pass = _io(
            graphs["denoiser"],
            {
                **shared,
                **_named("new", self.new_compressed, after=True),
                "tokens": self.compressor["tokens"],
                "extra": self.compressor["extra"],
                "timestep": np.zeros(1, np.float32),
            },
            N=config.compressed_tokens,
        )
        # without a high branch the compressor does not read the latents; the decoder still does
        size = (1, config.block_frames, config.latent_channels, *config.latent_size)
        self.latents = self.compressor.get("latents", np.zeros(size, np.float32))
        self.pixels = self.compressor["pixels"]
        # The tokens' memory seen as latents: what patchify and its inverse copy through.
        h, w = config.grid
        p = config.patch
        grid = (config.block_frames, h, w, config.latent_channels, p, p)
        self.tokens_as_latents = self.denoiser["tokens"].reshape(grid).transpose(0, 3, 1, 4, 2, 5)
        self.latents_as_patches = self.latents.reshape(config.block_frames, -1, h, p, w, p)
        self.decoder = self._decoder(graphs["vae_decoder"], config)

    def _decoder(self, spec: GraphSpec, config: Config) -> list[list[Arrays]]:
        """Arrays of the decoder call for [parity][latent frame of the block].

        State goes back and forth between two sets, and each call reads its latent and writes
        its frames where they belong: nothing is copied.
        """
        even, odd = ([np.zeros(_shape(t.shape), np.float32) for t in spec.inputs[1:]]
                     for _ in range(2))  # fmt: skip
        self.decoder_state = even
        frames = self.pixels[0].reshape(config.block_frames, -1, *self.pixels.shape[2:])
        return [
            [
                {
                    "latent": self.latents[:, frame],
                    "frames": frames[frame],
                    **{f"state.{i}": array for i, array in enumerate(old)},
                    **{f"new_state.{i}": array for i, array in enumerate(new)},
                }
                for frame in range(config.block_frames)
            ]
            for old, new in ((even, odd), (odd, even))
        ]


class Archive:
    """Every compressed block so far, in host memory, with the pooled keys that selection reads."""

    def __init__(self, config: Config, blocks: int) -> None:
        tokens = config.compressed_tokens if config.policy.mid else 0
        size = (config.layers, 2, 1, config.heads, tokens, config.head_dim)
        keys = (config.layers, config.heads, config.head_dim)
        first = config.policy.sink  # sink blocks are never compressed
        rows = max(0, blocks - first) if config.policy.mid else 0
        self.first = first
        self.key_values = np.zeros((rows, *size), np.float32)
        self.pooled_keys = np.zeros((rows, *keys), np.float32)

    def put(self, block: int, key_values: np.ndarray, pooled_key: np.ndarray) -> None:
        self.key_values[block - self.first] = key_values
        self.pooled_keys[block - self.first] = pooled_key

    def get(self, block: int) -> np.ndarray:
        """Keys and values of a block, [L, 2, 1, H, N_c, d]."""
        return self.key_values[block - self.first]

    def keys(self, blocks: range) -> np.ndarray:
        """Pooled keys of consecutive blocks, [blocks, L, H, d]; a view."""
        return self.pooled_keys[blocks.start - self.first : blocks.stop - self.first]


def memory(config: Config) -> dict[str, int]:
    """Bytes a rollout needs beside the weights, by purpose, from the config alone.

    All but `archive_per_block` is allocated once; the archive grows by that much with every
    block beyond the sink.
    """
    item = np.dtype(np.float32).itemsize
    token = 2 * config.layers * config.dim * item  # keys and values of all layers
    graphs = contract(config)

    def rest(graph: str, *shared: str, **axes: int) -> int:
        spec = graphs[graph]
        return sum(
            math.prod(_shape(tensor.shape, **axes)) * np.dtype(tensor.dtype).itemsize
            for tensor in (*spec.inputs, *spec.outputs)
            if "." not in tensor.name and tensor.name not in shared
        )

    full = {"N": config.block_tokens, "C": config.context_tokens}
    mid = {"N": config.compressed_tokens, "C": config.context_tokens}
    return {
        "context": token * config.context_tokens,
        "staging": token * (config.block_tokens + config.compressed_tokens),
        "cross_attention": token * config.text_len,
        "autoencoder_state": 2 * item * sum(map(math.prod, decoder_state_shapes(config))),
        "inputs_outputs": rest("prompt")
        + rest("compressor")
        + (0 if config.compressor_widths else rest("vae_decoder", "frames") * config.block_frames)
        + rest("denoiser", **full)
        + rest("denoiser", "tokens", "extra", "ctx_cos", "ctx_sin", **mid),
        "archive_per_block": archive_bytes(config, config.policy.sink + 1),
    }


def archive_bytes(config: Config, blocks: int) -> int:
    """Bytes of the archive of a video of this many blocks."""
    if not config.policy.mid:
        return 0
    vectors = 2 * config.compressed_tokens + 1  # keys, values and the pooled key
    rows = max(0, blocks - config.policy.sink)
    return rows * vectors * config.layers * config.dim * np.dtype(np.float32).itemsize


def _named(name: str, stacked: np.ndarray, after: bool = False) -> Arrays:
    """Per-layer views of stacked keys and values: cross_k.0, or with `after`, k_ctx.0."""
    return {
        (f"{kind}_{name}.{layer}" if after else f"{name}_{kind}.{layer}"): stacked[layer, i]
        for layer in range(len(stacked))
        for i, kind in enumerate("kv")
    }


def _shape(shape: tuple[int | str, ...], **axes: int) -> tuple[int, ...]:
    return tuple(axes[n] if isinstance(n, str) else n for n in shape)


def _zeros(spec: GraphSpec, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in spec.inputs if tensor.name == name)
    return np.zeros(_shape(tensor.shape), tensor.dtype)


def _io(spec: GraphSpec, given: Arrays | None = None, **axes: int) -> Arrays:
    """An array for every input and output of a graph: the given ones, new ones for the rest."""
    given = given or {}
    return {
        tensor.name: given[tensor.name]
        if tensor.name in given
        else np.zeros(_shape(tensor.shape, **axes), tensor.dtype)
        for tensor in (*spec.inputs, *spec.outputs)
    }
