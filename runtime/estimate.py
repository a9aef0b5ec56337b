"""What the engines of a model take on a card, from its config alone: weights, scratch and work.

Weights and operations follow from the layers, exactly. Scratch is what a builder plans for the
tensors alive at the worst moment; `scratch_bytes` says which these are. Times are a roofline:
no kernel reaches it, so they are lower bounds and predictions, never measurements.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from packforcing.config import TEMPORAL_FACTOR, Config
from packforcing.errors import ConfigError
from packforcing.geometry import layer_matrices, low_branch_clip, operations, parameters
from packforcing.runtime.bundle import DTYPES, GPU_CALLS, GPU_GRAPHS, TensorSpec, contract

ITEM = {"fp32": 4, "fp16": 2, "int8": 1, "fp8": 1}
ARRAY_ITEM = {"int64": 8} | {DTYPES[kind]: size for kind, size in ITEM.items()}
FEWEST_STRIPS = 5  # of the decoder that TensorRT-RTX works through in turn; fewer it keeps at once
WAN_STAGES = 5  # tensors of Wan's stage at full size that are alive at once
INT4_BLOCK = 128  # weights that share a scale


class GpuFigures(NamedTuple):
    """A card's figures, as NVIDIA publishes them."""

    target: str
    memory: int  # GiB
    tflops: float  # fp32, at the boost clock: 2 x CUDA cores x clock
    bandwidth: float  # GB/s


# Dense fp16 on the tensor cores, accumulated in fp32, is twice the fp32 rate on all of these:
# GeForce cards halve what the same chips do with fp16 accumulation.
GPUS = {
    "RTX 3060": GpuFigures("sm86", 12, 12.7, 360),
    "RTX 3080": GpuFigures("sm86", 10, 29.8, 760),
    "RTX 4060": GpuFigures("sm89", 8, 15.1, 272),
    "RTX 4090": GpuFigures("sm89", 24, 82.6, 1008),
    "RTX 5060": GpuFigures("sm120", 8, 19.2, 448),
    "RTX 5090": GpuFigures("sm120", 32, 104.8, 1792),
}


def find_gpu(name: str) -> GpuFigures:
    """The card of this name; spaces and case do not matter. Raises `ConfigError`."""
    plain = {known.replace(" ", "").lower(): card for known, card in GPUS.items()}
    wanted = name.replace(" ", "").replace("-", "").lower().removeprefix("geforce")
    if wanted not in plain:
        raise ConfigError(
            f"no figures for a GPU '{name}'; known: {', '.join(GPUS)}. "
            "For others give --budget and --target"
        )
    return plain[wanted]


def matrix_bytes(config: Config) -> list[int]:
    """Bytes of each matrix of a layer of the denoiser, in the format of the weights.

    Quantised ones come with scales, as computed: `weight_block` says how many.
    """
    kind, full = config.precision.weights, ITEM[config.precision.compute]
    sizes = []
    for inputs, outputs in layer_matrices(config):
        count = inputs * outputs
        if kind == config.precision.compute:
            sizes.append(count * full)
        else:
            whole = count // 2 if kind == "int4" else count * ITEM[kind]
            sizes.append(whole + count // weight_block(kind, inputs, outputs) * full)
    return sizes


def weight_block(kind: str, inputs: int, outputs: int) -> int:
    """Weights of an output channel that share a scale, in a matrix of int8, fp8 or int4.

    int4: 128 of them, or the largest power of two below that divides them. 8 bits: all of them;
    in int8 half where a matrix widens, since TensorRT-RTX 1.7 writes such a one out in fp16, into
    scratch, if a channel has one scale. In fp8 it takes no more than one.
    """
    if kind == "int4":
        return math.gcd(inputs, INT4_BLOCK)
    return inputs // 2 if kind == "int8" and outputs > inputs else inputs


def weight_bytes(config: Config) -> dict[str, int]:
    """Bytes of each graph's weights when loaded.

    Quantised are the matrices of the denoiser's layers but for the first and the last. All else
    stays as computed: biases, norms, modulation, embeddings, head, and the other graphs. Of those
    on the host, ONNX Runtime keeps the fp16 of the file beside the fp32 that it makes of it.
    """
    full = ITEM[config.precision.compute]
    counts = parameters(config)
    on_host = ITEM["fp32"] + ITEM["fp16"]
    sizes = {name: count * on_host for name, count in counts.items()}
    sizes |= {name: counts[name] * full for name in GPU_GRAPHS}
    plain = sum(inputs * outputs * full for inputs, outputs in layer_matrices(config))
    # TensorRT writes down what each value of the compressor's average pool is divided by
    sizes["compressor"] += full * math.prod(low_branch_clip(config))
    sizes["denoiser"] += max(0, config.layers - 2) * (sum(matrix_bytes(config)) - plain)
    return sizes


@lru_cache(8)
def tensor_bytes(config: Config) -> dict[str, dict[str, int]]:
    """Bytes of each input and output of the calls, and of the graphs that run on the host."""
    graphs, context = contract(config), config.context_tokens
    axes = {
        "denoiser.block": {"N": config.block_tokens, "C": context},
        "denoiser.compressed": {"N": config.compressed_tokens, "C": context},
    }

    def size(tensor: TensorSpec, axes: dict[str, int]) -> int:
        shape = [axes[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
        return math.prod(shape) * ARRAY_ITEM[tensor.dtype]

    return {
        call: {
            tensor.name: size(tensor, axes.get(call, {}))
            for tensor in (*graphs[graph].inputs, *graphs[graph].outputs)
        }
        for call, graph in {
            **GPU_CALLS,
            **{name: name for name in ("prompt", "vae_encoder")},
        }.items()
    }


def calls_per_block(config: Config) -> dict[str, int]:
    """How often each call is made for a block: steps and commit, mid pass, and decoding."""
    compresses = int(config.policy.mid > 0)
    return {
        "denoiser.block": len(config.timesteps) + 1,
        "denoiser.compressed": compresses,
        "compressor": compresses,
        "vae_decoder": config.block_frames,
    }


def seconds_per_block(config: Config, card: GpuFigures) -> float:
    """The roofline of a block once the context is full: a lower bound, predicted.

    Per call the larger of operations / peak rate and bytes / bandwidth, where bytes are weights,
    inputs and outputs, each moved once. Weights of whole numbers are multiplied as fp16; where they
    are fp8, all of the denoiser is counted at fp8's rate, which is twice that. Left out: the host's
    part, copies to and from the card, streamed weights.
    """
    rate = card.tflops * 1e12 * (2 if config.precision.compute == "fp16" else 1)
    work, moved, weights = operations(config), tensor_bytes(config), weight_bytes(config)
    if config.precision.weights == "fp8":
        work = {
            call: count // 2 if GPU_CALLS[call] == "denoiser" else count
            for call, count in work.items()
        }
    return sum(
        times
        * max(
            work[call] / rate,
            (sum(moved[call].values()) + weights[GPU_CALLS[call]]) / (card.bandwidth * 1e9),
        )
        for call, times in calls_per_block(config).items()
    )


def scratch_bytes(config: Config) -> dict[str, int]:
    """Bytes of scratch of each call: the tensors alive at the worst moment, as TensorRT-RTX plans
    it, found by comparing with its figures (`tests/runtime/test_plan.py` has the bounds).

    denoiser: one layer's keys and values, new and context joined; inside the feed-forward layer,
    what it expands the new tokens to and two tensors of the model's width. compressor: three
    tensors of the encoder's first stage over the small clip. vae_decoder: what the last 3x3
    convolution reads and writes at full size, and three tensors of the stage before it; in
    strips, six of those. Wan's, decoder and encoder: `WAN_STAGES` tensors of the stage at full
    size, over four frames. Each with a workspace.
    """
    workspace, item = 4 << 20, ITEM[config.precision.compute]

    def denoiser(new: int) -> int:
        keys_values = 2 * (new + config.context_tokens) * config.dim
        return keys_values + new * (config.ffn_dim + 2 * config.dim)

    h, w = config.height // config.vae_patch, config.width // config.vae_patch
    _, _, before, last = config.vae_decoder_widths
    full = TEMPORAL_FACTOR * (before + last) * h * w
    half = TEMPORAL_FACTOR // 2 * before * (h // 2) * (w // 2)
    in_turn = config.vae_strips >= FEWEST_STRIPS
    values = {
        "denoiser.block": denoiser(config.block_tokens),
        "denoiser.compressed": denoiser(config.compressed_tokens),
        "compressor": 3
        * math.prod(low_branch_clip(config))
        * config.vae_encoder_width
        // config.vae_patch**2,
        "vae_decoder": 6 * half if in_turn else full + 3 * half,
    }
    if config.vae == "wan":
        small = TEMPORAL_FACTOR * (config.height // 4) * (config.width // 4)
        values["compressor"] = WAN_STAGES * small * config.vae_encoder_width
        values["vae_decoder"] = WAN_STAGES * TEMPORAL_FACTOR * h * w * last
    return {call: item * count + workspace for call, count in values.items()}
