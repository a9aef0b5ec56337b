"""Estimate what the engines of a model need on a GPU, from the config alone.

Weights and operations follow exactly from the layers. Scratch is what a builder plans for the
tensors that are alive at the worst moment; `scratch_bytes` says which these are. Times are a
roofline, which no kernel reaches: lower bounds and predictions, never measurements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import NamedTuple

from packforcing.config import TEMPORAL_FACTOR, Config, Precision
from packforcing.geometry import (
    denoiser_operations,
    layer_matrices,
    low_branch_clip,
    operations,
    parameters,
    quantized_layers,
)
from packforcing.runtime.bundle import DTYPES, GPU_CALLS, GPU_GRAPHS, contract
from packforcing.runtime.gpus import GpuFigures

ITEM = {"fp32": 4, "fp16": 2, "int8": 1, "fp8": 1}
WEIGHT_ITEM = {"int8": 1, "w8a8": 1, "fp8": 1, "int4": 0.5, "nvfp4": 0.5}
ARRAY_ITEM = {"int64": 8} | {DTYPES[kind]: size for kind, size in ITEM.items()}
FEWEST_STRIPS = 5  # TensorRT-RTX runs so many strips of the decoder in turn, fewer at once
WAN_STAGES = 5  # tensors of Wan's stage at full size that are alive at once
INT4_BLOCK, FP4_BLOCK = 128, 16  # weights that share a scale


def matrix_bytes(config: Config) -> list[int]:
    """Return the bytes of each matrix of a denoiser layer, in the dtype of the weights.

    Quantized ones come with scales in the dtype of the computation, or fp8 with nvfp4:
    `weight_block` says how many.
    """
    kind, full = config.precision.weights, ITEM[config.precision.compute]
    sizes = []
    for inputs, outputs in layer_matrices(config):
        count = inputs * outputs
        if kind == config.precision.compute:
            sizes.append(count * full)
        else:
            scales = count // weight_block(kind, inputs, outputs)
            scale_bytes = ITEM["fp8"] if kind == "nvfp4" else full
            sizes.append(int(count * WEIGHT_ITEM[kind]) + scales * scale_bytes)
    return sizes


def weight_block(kind: str, inputs: int, outputs: int) -> int:
    """Return how many weights of an output channel share a scale.

    int4: 128, or the largest power of two below that divides them. nvfp4: 16. fp8 and w8a8: all.
    int8: all, but half of them in a matrix that widens: with one scale per channel, TensorRT-RTX
    1.7 would write such a matrix out in fp16, into scratch.

    Args:
        kind: A quantized dtype of `Precision.weights`.
        inputs: Rows of the matrix.
        outputs: Its columns.
    """
    if kind == "int4":
        return math.gcd(inputs, INT4_BLOCK)
    if kind == "nvfp4":
        return FP4_BLOCK
    return inputs // 2 if kind == "int8" and outputs > inputs else inputs


def weight_bytes(config: Config) -> dict[str, int]:
    """Return the bytes of each graph's weights when loaded.

    Only the matrices of the denoiser's inner layers are quantized. The first and the last layer,
    biases, norms, modulation, embeddings, head and the other graphs have the dtype of the
    computation. For graphs on the host, ONNX Runtime has the file's fp16 and its fp32 copy.
    """
    full = ITEM[config.precision.compute]
    counts = parameters(config)
    on_host = ITEM["fp32"] + ITEM["fp16"]
    sizes = {name: count * on_host for name, count in counts.items()}
    sizes |= {name: counts[name] * full for name in GPU_GRAPHS}
    plain = sum(inputs * outputs * full for inputs, outputs in layer_matrices(config))
    # TensorRT stores the divisor of each value of the compressor's average pool
    sizes["compressor"] += full * math.prod(low_branch_clip(config))
    sizes["denoiser"] += len(quantized_layers(config)) * (sum(matrix_bytes(config)) - plain)
    return sizes


@lru_cache(8)
def tensor_bytes(config: Config) -> dict[str, dict[str, int]]:
    """Return the bytes of each input and output, by call and, on the host, by graph."""
    graphs, context = contract(config), config.context_tokens
    axes = {
        "denoiser.block": {"N": config.block_tokens, "C": context},
        "denoiser.compressed": {"N": config.compressed_tokens, "C": context},
    }

    @cache  # the tensors of all layers are of one size
    def size(shape: tuple[int | str, ...], dtype: str, call: str) -> int:
        sides = [axes[call][axis] if isinstance(axis, str) else axis for axis in shape]
        return math.prod(sides) * ARRAY_ITEM[dtype]

    return {
        call: {
            tensor.name: size(tensor.shape, tensor.dtype, call)
            for tensor in (*graphs[graph].inputs, *graphs[graph].outputs)
        }
        for call, graph in {
            **GPU_CALLS,
            **{name: name for name in ("prompt", "vae_encoder")},
        }.items()
    }


def calls_per_block(config: Config) -> dict[str, int]:
    """Return how often each call runs for a block: steps and commit, mid pass, decoding."""
    compresses = int(config.policy.mid > 0)
    return {
        "denoiser.block": len(config.timesteps) + (config.policy.commit == "clean"),
        "denoiser.compressed": compresses,
        "compressor": compresses,
        "vae_decoder": config.block_frames,
    }


class Call(NamedTuple):
    """What a call needs of a GPU's time.

    Attributes:
        new_tokens: Tokens that the denoiser computes; 0 for another graph.
        times: How often it runs for a block.
        quantizable: Operations, here and below by the kinds of `geometry.denoiser_operations`.
        self_attention: Operations.
        other: Operations.
        moved: Bytes of weights, inputs and outputs, each once.
    """

    new_tokens: int
    times: int
    quantizable: int
    self_attention: int
    other: int
    moved: int


def calls(config: Config) -> list[Call]:
    """Return the calls of a block once the context is full."""
    total, tensors, weights = operations(config), tensor_bytes(config), weight_bytes(config)
    new_tokens = {
        "denoiser.block": config.block_tokens,
        "denoiser.compressed": config.compressed_tokens,
    }
    result = []
    for call, times in calls_per_block(config).items():
        tokens, kinds = new_tokens.get(call, 0), {"other": total[call]}
        if tokens:
            kinds = denoiser_operations(config, tokens)
        quantizable, self_attention = kinds.get("quantizable", 0), kinds.get("self_attention", 0)
        moved = sum(tensors[call].values()) + weights[GPU_CALLS[call]]
        result.append(Call(tokens, times, quantizable, self_attention, kinds["other"], moved))
    return result


def seconds_of_calls(calls: Iterable[Call], precision: Precision, gpu: GpuFigures) -> float:
    """Predict the seconds that calls take, by a roofline: a lower bound.

    Per call, it is the larger of operations / peak rate and bytes / bandwidth. Every product counts
    at the rate of the dtype that it is computed in: those with integer weights that are dequantized
    in fp16, self-attention in its own. The host's work, transfers to and from the GPU and streamed
    weights are left out.

    Args:
        calls: Of a config.
        precision: Its precision.
        gpu: The GPU's figures; it has the dtypes.
    """
    return seconds_at_rates(
        calls,
        gpu.tflops[precision.products],
        gpu.tflops[precision.attention_products],
        gpu.tflops[precision.compute],
        gpu.bandwidth,
    )


def seconds_at_rates(
    calls: Iterable[Call], products: float, attention: float, other: float, bandwidth: float
) -> float:
    """Predict the seconds that calls take: see `seconds_of_calls`.

    Args:
        calls: Of a config.
        products: Rate of the matrices of the inner layers, in 10^12 operations per second.
        attention: Rate of self-attention.
        other: Rate of all else.
        bandwidth: In GB/s.
    """
    per_product, per_attended, per_other, per_byte = (
        1e-12 / products, 1e-12 / attention, 1e-12 / other, 1e-9 / bandwidth,
    )  # fmt: skip
    seconds = 0.0
    for call in calls:  # a loop, as planners come here for every candidate and GPU
        computing = (
            call.quantizable * per_product
            + call.self_attention * per_attended
            + call.other * per_other
        )
        seconds += call.times * max(computing, call.moved * per_byte)
    return seconds


def seconds_per_block(config: Config, gpu: GpuFigures) -> float:
    """Predict the seconds of a block once the context is full: see `seconds_of_calls`."""
    return seconds_of_calls(calls(config), config.precision, gpu)


def scratch_bytes(config: Config) -> dict[str, int]:
    """Estimate the scratch bytes of each call: the tensors alive at the worst moment.

    The rules were fitted to what TensorRT-RTX reports; `tests/runtime/test_plan.py` has the bounds.
    Each call has a workspace besides.

    - denoiser: one layer's keys and values, new and context joined, in the dtype of the computation
      also where attention reads them in another; in the feed-forward layer, the expanded new tokens
      and two tensors of the model's width.
    - compressor: three tensors of the encoder's first stage over the small clip.
    - vae_decoder: input and output of the last 3x3 convolution at full size and three tensors of
      the stage before it; in strips, six of those.
    - Wan's decoder and encoder: `WAN_STAGES` tensors of the stage at full size, over four frames.
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
