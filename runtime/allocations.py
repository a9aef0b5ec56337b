"""Every array of a rollout, in one list: the plan sums it, the buffers allocate it.

Keys and values of all layers share one array per purpose, [L, 2, 1, H, tokens, d] with the keys
first, so that a commit is one copy. The other arrays are inputs and outputs of the contract's
graphs (`packforcing.runtime.bundle`), each named by its graph. What two calls share is here once:
the mid pass reads the compressor's `tokens` and `extra` and the block's context positions.

The archive is not in the list, as it grows with the video: `archive_bytes` has its size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from packforcing.config import Config
from packforcing.runtime.bundle import DTYPES, GraphSpec, contract

# inputs and outputs that host code writes or reads
BLOCK_HOST_VIEWS = (
    "tokens", "timestep", "rope_cos", "rope_sin", "ctx_cos", "ctx_sin", "kv_len", "flow", "q_pool",
)  # fmt: skip
MID_PASS_HOST_VIEWS = ("rope_cos", "rope_sin", "kv_len", "k_pool")
MID_PASS_SHARED = ("tokens", "extra", "ctx_cos", "ctx_sin")  # arrays of other calls


class Allocation(NamedTuple):
    """One array.

    Attributes:
        name: Unique. Of an input or output: the call, a dot and the tensor's name.
        purpose: What it counts under in a plan.
        shape: Its shape.
        dtype: Its dtype, as NumPy knows it.
        place: The memory it is in; under a backend on the CPU both are the host's.
        host_view: Whether host code reads or writes it. On a GPU it then has a copy of the same
            size in pinned memory.
    """

    name: str
    purpose: str
    shape: tuple[int, ...]
    dtype: str
    place: Literal["device", "host"] = "device"
    host_view: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes, without the pinned copy."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@lru_cache(8)
def allocations(config: Config) -> tuple[Allocation, ...]:
    """List every array that is allocated once for the rollouts of a config."""
    graphs, policy = contract(config), config.policy
    cache, compute = DTYPES[config.precision.cache], DTYPES[config.precision.compute]

    def key_values(name: str, purpose: str, tokens: int, dtype: str, view: bool) -> Allocation:
        shape = (config.layers, 2, 1, config.heads, tokens, config.head_dim)
        return Allocation(name, purpose, shape, dtype, host_view=view)

    (text,) = graphs["prompt"].inputs
    compressor = _inputs_outputs("compressor", graphs["compressor"], ("latents", "pixels"))
    result = [
        key_values("context", "context", config.context_tokens, cache, False),
        key_values("staging.block", "staging", config.block_tokens, cache, False),
        # passes through the host on its way to the archive and back
        key_values("staging.compressed", "staging", config.compressed_tokens, cache, True),
        # written by a graph on the host
        key_values("cross_attention", "cross_attention", config.text_len, compute, True),
        *[
            Allocation(
                f"decoder.{turn}.{tensor.name}",
                "autoencoder_state",
                fixed_shape(tensor.shape),
                tensor.dtype,
            )
            for turn in range(2)  # a call reads one set of states and writes the other
            for tensor in graphs["vae_decoder"].inputs[1:]
        ],
        Allocation("text", "inputs_outputs", fixed_shape(text.shape), text.dtype, "host", True),
        # clean tokens of the recent blocks, for prompt switches
        Allocation(
            "recent", "inputs_outputs", (policy.recent, config.block_tokens, config.token_dim),
            "float32", "host", True,
        ),
        *compressor,
        *_inputs_outputs(
            "denoiser", graphs["denoiser"], BLOCK_HOST_VIEWS,
            N=config.block_tokens, C=config.context_tokens,
        ),
        *_inputs_outputs(
            "mid_pass", graphs["denoiser"], MID_PASS_HOST_VIEWS, MID_PASS_SHARED,
            N=config.compressed_tokens,
        ),
    ]  # fmt: skip
    if all(array.name != "compressor.latents" for array in compressor):
        # without a high branch the compressor reads no latents; the decoder still does
        shape = (1, config.block_frames, config.latent_channels, *config.latent_size)
        result.append(Allocation("latents", "inputs_outputs", shape, "float32", host_view=True))
    if policy.restart:
        result += encoder_allocations(config)
    return tuple(result)


def encoder_allocations(config: Config) -> list[Allocation]:
    """List the arrays of the graph `vae_encoder`, which runs on the host."""
    spec = contract(config)["vae_encoder"]
    return [
        Allocation(f"encoder.{tensor.name}", "inputs_outputs", fixed_shape(tensor.shape),
                   tensor.dtype, "host", True)
        for tensor in (*spec.inputs, *spec.outputs)
    ]  # fmt: skip


def _inputs_outputs(
    call: str,
    spec: GraphSpec,
    host_views: Collection[str],
    shared: Collection[str] = (),
    **axes: int,
) -> list[Allocation]:
    """List the arrays of a call, without those per layer and those that other calls have."""
    return [
        Allocation(f"{call}.{tensor.name}", "inputs_outputs", fixed_shape(tensor.shape, **axes),
                   tensor.dtype, host_view=tensor.name in host_views)
        for tensor in (*spec.inputs, *spec.outputs)
        if "." not in tensor.name and tensor.name not in shared
    ]  # fmt: skip


def fixed_shape(shape: tuple[int | str, ...], **axes: int) -> tuple[int, ...]:
    """Return a shape of the contract with the sizes of its open axes."""
    return tuple(axes[n] if isinstance(n, str) else n for n in shape)


def memory_by_purpose(config: Config) -> dict[str, int]:
    """Sum the buffers of a rollout in bytes by purpose, wherever they are.

    All but `archive_per_block` is allocated once. The archive grows by that much with every
    block beyond the sink.
    """
    sums = Counter[str]()
    for array in allocations(config):
        sums[array.purpose] += array.nbytes
    return {**sums, "archive_per_block": archive_bytes(config, config.policy.sink + 1)}


def device_bytes(config: Config) -> dict[str, int]:
    """Sum what a GPU holds beside weights and scratch, in bytes, by row of a plan.

    The context is divided into its partitions and staging into its two arrays.
    """
    sums = Counter[str]()
    for array in allocations(config):
        if array.place == "device":
            row = array.name if array.purpose == "staging" else array.purpose
            sums[row] += array.nbytes
    policy, token = config.policy, token_bytes(config)
    cache_rows = {
        "cache.sink": token * policy.sink * config.block_tokens,
        "cache.recent": token * policy.recent * config.block_tokens,
        "cache.mid": token * policy.mid * config.compressed_tokens,
    }
    assert sum(cache_rows.values()) == sums.pop("context")
    return {**cache_rows, **sums}


def host_bytes(config: Config, *, shared: bool = False) -> int:
    """Sum the host memory beside a GPU: pinned copies, and arrays that only the host has.

    Args:
        config: The model.
        shared: Whether the GPU has the host's memory and needs no copies.
    """
    return sum(
        array.nbytes
        for array in allocations(config)
        if array.host_view and (array.place == "host" or not shared)
    )


def token_bytes(config: Config) -> int:
    """Return the bytes of one token in the cache: keys and values of all layers."""
    return 2 * config.layers * config.dim * np.dtype(DTYPES[config.precision.cache]).itemsize


def archive_rows(config: Config, blocks: int) -> int:
    """Return how many of the first blocks are archived: sink blocks are never compressed."""
    return max(0, blocks - config.policy.sink) if config.policy.mid else 0


def archive_bytes(config: Config, blocks: int) -> int:
    """Return the bytes of a video's archive: keys and values as in the cache, and pooled keys."""
    pooled = config.layers * config.dim * np.dtype(np.float32).itemsize
    row = config.compressed_tokens * token_bytes(config) + pooled
    return archive_rows(config, blocks) * row


def snapshot_bytes(config: Config) -> int:
    """Return the host memory that taking a snapshot of a rollout needs at most, in bytes.

    That is the keys and values of the sink and the recent blocks and the decoder's state, and one
    layer's keys or values of the whole context, twice: as they are, and in transfer from the GPU.
    """
    tokens = (config.policy.sink + config.policy.recent) * config.block_tokens
    layer = config.context_tokens * token_bytes(config) // (2 * config.layers)
    states = memory_by_purpose(config)["autoencoder_state"]
    return tokens * token_bytes(config) + 2 * layer + states // 2
