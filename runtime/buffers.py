"""Every array of a rollout, allocated once: sizes from the config, names from the contract."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from packforcing.config import TEMPORAL_FACTOR, Config
from packforcing.errors import OutputError
from packforcing.runtime.bundle import DTYPES, GraphSpec, contract
from packforcing.runtime.device import Array, HostDevice

Arrays = dict[str, Array]
IN_MEMORY = 4 << 30  # bytes of an archive's keys and values; those of a longer video are in a file


class Buffers:
    """The fixed arrays that graphs read and write, and the history.

    Keys and values of all layers share one array per purpose, [L, 2, 1, H, tokens, d] (keys
    first), so that a commit is one copy; graphs see its per-layer slices by name. Only what
    crosses between host and device has a view on the host.
    """

    def __init__(self, config: Config, device: HostDevice) -> None:
        self._device = device
        graphs = contract(config)
        cache, compute = DTYPES[config.precision.cache], DTYPES[config.precision.compute]

        def key_values(purpose: str, tokens: int, dtype: str, host: bool = False) -> Array:
            shape = (config.layers, 2, 1, config.heads, tokens, config.head_dim)
            return device.allocate(purpose, shape, dtype, host=host)

        self.context = key_values("context", config.context_tokens, cache)
        self.new = key_values("staging", config.block_tokens, cache)
        # seen by the host on its way to the archive and back
        self.new_compressed = key_values("staging", config.compressed_tokens, cache, host=True)
        # written on the host, by a graph that runs there
        self.cross = key_values("cross_attention", config.text_len, compute, host=True)
        (text,) = graphs["prompt"].inputs
        self.text = device.host.allocate(
            "inputs_outputs", _shape(text.shape), text.dtype, host=True
        )
        # the recent blocks' clean tokens, block b in row b % recent, for prompt switches
        self.recent = device.host.allocate(
            "inputs_outputs",
            (config.policy.recent, config.block_tokens, config.token_dim),
            np.float32,
            host=True,
        ).host
        cross = _named("cross", self.cross)
        self.prompt = {"text": self.text, **{name: cross[name].on_host() for name in cross}}
        self.compressor = self._io(graphs["compressor"], seen=("latents", "pixels"))
        shared = {**cross, **_named("ctx", self.context, after=True)}
        self.denoiser = self._io(
            graphs["denoiser"],
            {**shared, **_named("new", self.new, after=True)},
            seen=("tokens", "timestep", "rope_cos", "rope_sin", "ctx_cos", "ctx_sin", "kv_len",
                  "flow", "q_pool"),
            N=config.block_tokens,
            C=config.context_tokens,
        )  # fmt: skip
        self.mid_pass = self._io(
            graphs["denoiser"],
            {
                **shared,
                **_named("new", self.new_compressed, after=True),
                **{name: self.denoiser[name] for name in ("ctx_cos", "ctx_sin")},
                **{name: self.compressor[name] for name in ("tokens", "extra")},
            },
            seen=("rope_cos", "rope_sin", "kv_len", "k_pool"),
            N=config.compressed_tokens,
        )
        frames, h, w = config.block_frames, *config.latent_size
        # without a high branch the compressor does not read the latents; the decoder still does
        self.latents = self.compressor.get("latents") or device.allocate(
            "inputs_outputs", (1, frames, config.latent_channels, h, w), np.float32, host=True
        )
        self.pixels = self.compressor["pixels"]
        # The tokens' memory seen as latents: what patchify and its inverse copy through.
        (rows, columns), p = config.grid, config.patch
        grid = (frames, rows, columns, config.latent_channels, p, p)
        self.tokens_as_latents = (
            self.denoiser["tokens"].host.reshape(grid).transpose(0, 3, 1, 4, 2, 5)
        )
        self.latents_as_patches = self.latents.host.reshape(frames, -1, rows, p, columns, p)
        self.decoder = self._decoder(graphs["vae_decoder"], config)
        # of the graph on the host that a restart calls
        self.encoder = encoder_arrays(config, device.host) if config.policy.restart else None
        # A NaN beyond the valid part of the context would spread through 0 * NaN, and so would
        # one in a position table. The mid pass is always at timestep 0.
        for name in ("ctx_cos", "ctx_sin"):
            self.denoiser[name].host[...] = 0
        device.zero(self.denoiser["extra"])
        device.zero(self.mid_pass["timestep"])

    def clear(self) -> None:
        """Forgets the video before: history and decoder state."""
        for array in (self.context, *self.decoder_state):
            self._device.zero(array)

    def _decoder(self, spec: GraphSpec, config: Config) -> list[Arrays]:
        """Arrays of the decoder's calls, in turn: latent frame after latent frame.

        State goes back and forth between two sets, and each call reads its latent and writes
        its frames where they belong: nothing is copied.
        """
        states = [
            [
                self._device.allocate("autoencoder_state", _shape(tensor.shape), tensor.dtype)
                for tensor in spec.inputs[1:]
            ]
            for _ in range(2)
        ]
        self.decoder_state = states[0]
        count = config.block_frames
        latents = self.latents.reshape(count, 1, *self.latents.shape[2:])
        frames = self.pixels.reshape(count, TEMPORAL_FACTOR, *self.pixels.shape[2:])
        return [
            {
                "latent": latents[call % count],
                "frames": frames[call % count],
                **{f"state.{i}": array for i, array in enumerate(states[call % 2])},
                **{f"new_state.{i}": array for i, array in enumerate(states[1 - call % 2])},
            }
            for call in range(math.lcm(count, 2))
        ]

    def _io(
        self, spec: GraphSpec, given: Arrays | None = None, seen: Collection[str] = (), **axes: int
    ) -> Arrays:
        """An array for every input and output: the given ones, new ones for the rest."""
        given = given or {}
        return {
            tensor.name: given[tensor.name]
            if tensor.name in given
            else self._device.allocate(
                "inputs_outputs",
                _shape(tensor.shape, **axes),
                tensor.dtype,
                host=tensor.name in seen,
            )
            for tensor in (*spec.inputs, *spec.outputs)
        }


def encoder_arrays(config: Config, device: HostDevice) -> Arrays:
    """What the graph `vae_encoder` reads and writes, on the host."""
    spec = contract(config)["vae_encoder"]
    return {
        tensor.name: device.allocate(
            "inputs_outputs", _shape(tensor.shape), tensor.dtype, host=True
        )
        for tensor in (*spec.inputs, *spec.outputs)
    }


class Archive:
    """Every compressed block so far, in host memory, with the pooled keys that selection reads.

    Keys and values of more than `IN_MEMORY` bytes lie in a file without a name instead, in
    `folder` or where the system keeps temporary files; the system keeps what is read often in
    memory. All of it is reserved here and now: raises `OutputError` if the disk refuses.
    """

    def __init__(self, config: Config, blocks: int, folder: Path | None = None) -> None:
        tokens = config.compressed_tokens if config.policy.mid else 0
        size = (config.layers, 2, 1, config.heads, tokens, config.head_dim)
        keys = (config.layers, config.heads, config.head_dim)
        cache = DTYPES[config.precision.cache]
        self.first = config.policy.sink
        rows = archive_rows(config, blocks)
        self.key_values = _zeros((rows, *size), np.dtype(cache), folder)
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


def _zeros(shape: tuple[int, ...], dtype: np.dtype, folder: Path | None) -> np.ndarray:
    """Zeros in memory, or if they are many in a file."""
    size = math.prod(shape) * dtype.itemsize
    if size <= IN_MEMORY:
        return np.zeros(shape, dtype)
    where = folder or Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(dir=where) as file:
            # without room, writing through memory would end the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise OutputError(
            f"the archive of this video takes {size / 1e9:.1f} GB, which {where} refuses "
            f"({error.strerror}): free some space there, or make the video shorter"
        ) from error


def archive_rows(config: Config, blocks: int) -> int:
    """How many of the first blocks are archived: sink blocks are never compressed."""
    return max(0, blocks - config.policy.sink) if config.policy.mid else 0


def _named(name: str, stacked: Array, after: bool = False) -> Arrays:
    """Per-layer views of stacked keys and values: cross_k.0, or with `after`, k_ctx.0."""
    return {
        (f"{kind}_{name}.{layer}" if after else f"{name}_{kind}.{layer}"): stacked[layer, i]
        for layer in range(stacked.shape[0])
        for i, kind in enumerate("kv")
    }


def _shape(shape: tuple[int | str, ...], **axes: int) -> tuple[int, ...]:
    return tuple(axes[n] if isinstance(n, str) else n for n in shape)
