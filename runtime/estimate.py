"""Estimate what the engines of a model need on a GPU, from the config alone.

Weights and operations follow exactly from the layers. Scratch is what a builder plans for the
tensors that are alive at the worst moment; `scratch_bytes` says which these are. Times are a
roofline, which no kernel reaches: lower bounds and predictions, never measurements.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import NamedTuple

from packforcing.config import TEMPORAL_FACTOR, Config
from packforcing.errors import ConfigError
from packforcing.geometry import layer_matrices, low_branch_clip, operations, parameters
from packforcing.runtime.bundle import DTYPES, GPU_CALLS, GPU_GRAPHS, TensorSpec, contract

ITEM = {"fp32": 4, "fp16": 2, "int8": 1, "fp8": 1}
ARRAY_ITEM = {"int64": 8} | {DTYPES[kind]: size for kind, size in ITEM.items()}
FEWEST_STRIPS = 5  # TensorRT-RTX runs so many strips of the decoder in turn, fewer at once
WAN_STAGES = 5  # tensors of Wan's stage at full size that are alive at once
INT4_BLOCK = 128  # weights that share a scale


class GpuFigures(NamedTuple):
    """A GPU's figures, as NVIDIA publishes them."""

    target: str
    memory: int  # GiB
    tflops: float  # fp32, at the boost clock: 2 x CUDA cores x clock
    bandwidth: float  # GB/s


# Dense fp16 on the tensor cores, accumulated in fp32, is twice the fp32 rate on all of these:
# with fp32 accumulation, GeForce GPUs run at half the rate of fp16 accumulation.
GPUS = {
    "RTX 3060": GpuFigures("sm86", 12, 12.7, 360),
    "RTX 3080": GpuFigures("sm86", 10, 29.8, 760),
    "RTX 4060": GpuFigures("sm89", 8, 15.1, 272),
    "RTX 4090": GpuFigures("sm89", 24, 82.6, 1008),
    "RTX 5060": GpuFigures("sm120", 8, 19.2, 448),
    "RTX 5090": GpuFigures("sm120", 32, 104.8, 1792),
}


_AROUND_NAME = re.compile(  # what tools print before and after a GPU's name
    r"""^\s*(?:gpu|device)?\s*\#?\d{1,2}\s*[:-]  # nvidia-smi -L, Task Manager: an index
    | ^\s*cuda:\d+                               # torch
    | \(uuid:.*\)                                # nvidia-smi -L
    | ^.*\[(?=[^]]*rtx) | \].*$                  # lspci: the chip, and a revision
    | /pcie/sse2                                 # OpenGL
    | \((?:tm|r)\)                               # trademarks
    """,
    re.IGNORECASE | re.VERBOSE,
)
_GENERIC_WORDS = {"nvidia", "corporation", "geforce", "rtx", "gpu", "graphics", "desktop"}
_ARCHITECTURES = {  # of names without figures
    r"rtx pro \d+.* blackwell|rtx 50[5-9]0": "sm120",
    r"\bada\b|rtx 40[5-9]0|\bl40?s?\b": "sm89",
    r"rtx 30[5-9]0|\brtx a\d{3,4}\b|\ba(?:10|16|40)\b": "sm86",
    r"\ba(?:30|100)\b": "sm80",
    r"rtx 20[5-8]0|quadro rtx|titan rtx|gtx 16\d0|\bt4\b": "sm75",
}


def find_gpu(name: str) -> GpuFigures:
    """Return the figures of a GPU by its name, as tools print it.

    A word that is not part of the product's name, like Ti, SUPER, D, Laptop or Max-Q, or another
    amount of memory, makes it another GPU.

    Raises:
        ConfigError: There are no figures for it.
    """
    text = _AROUND_NAME.sub(" ", name.lower())
    memory = re.search(r"(\d+)\s*([gm])i?b\b", text)
    memory_gib = int(memory[1]) / (1 if memory[2] == "g" else 1024) if memory else 0
    words = re.findall(r"[^\W\d_]+|\d+", text.replace(memory[0], " ") if memory else text)
    number = " ".join(word for word in words if word not in _GENERIC_WORDS)
    known = {full_name.lower(): gpu for full_name, gpu in GPUS.items()}
    gpu = known.get(f"rtx {number}")
    if gpu is None or (memory and round(memory_gib) != gpu.memory):
        spaced = re.sub(r"\brtx(?=\d)", "rtx ", " ".join(re.findall(r"\w+", text)))
        target = next((t for form, t in _ARCHITECTURES.items() if re.search(form, spaced)), None)
        raise ConfigError(
            f"no figures for a GPU '{name}'; known: {', '.join(GPUS)}. "
            + (
                f"For this one use --target {target}, and --budget with its memory in GiB"
                if target
                else "For others use --budget and --target"
            )
        )
    return gpu


def matrix_bytes(config: Config) -> list[int]:
    """Return the bytes of each matrix of a denoiser layer, in the dtype of the weights.

    Quantized ones come with scales in the dtype of the computation: `weight_block` says how many.
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
    """Return how many weights of an output channel share a scale.

    int4: 128, or the largest power of two below that divides them. fp8: all. int8: all, but half
    of them in a matrix that widens: with one scale per channel, TensorRT-RTX 1.7 would write such
    a matrix out in fp16, into scratch.

    Args:
        kind: "int8", "fp8" or "int4".
        inputs: Rows of the matrix.
        outputs: Its columns.
    """
    if kind == "int4":
        return math.gcd(inputs, INT4_BLOCK)
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
    sizes["denoiser"] += max(0, config.layers - 2) * (sum(matrix_bytes(config)) - plain)
    return sizes


@lru_cache(8)
def tensor_bytes(config: Config) -> dict[str, dict[str, int]]:
    """Return the bytes of each input and output, by call and, on the host, by graph."""
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
    """Return how often each call runs for a block: steps and commit, mid pass, decoding."""
    compresses = int(config.policy.mid > 0)
    return {
        "denoiser.block": len(config.timesteps) + 1,
        "denoiser.compressed": compresses,
        "compressor": compresses,
        "vae_decoder": config.block_frames,
    }


def seconds_per_block(config: Config, gpu: GpuFigures) -> float:
    """Predict the seconds of a block once the context is full, by a roofline: a lower bound.

    Per call, it is the larger of operations / peak rate and bytes / bandwidth. Bytes are weights,
    inputs and outputs, each moved once. Integer weights are multiplied in fp16; with fp8 weights,
    all of the denoiser counts at fp8's rate, which is twice fp16's. The host's work, transfers to
    and from the GPU and streamed weights are left out.

    Args:
        config: The model, its policy and precision.
        gpu: The GPU's figures.
    """
    rate = gpu.tflops * 1e12 * (2 if config.precision.compute == "fp16" else 1)
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
            (sum(moved[call].values()) + weights[GPU_CALLS[call]]) / (gpu.bandwidth * 1e9),
        )
        for call, times in calls_per_block(config).items()
    )


def scratch_bytes(config: Config) -> dict[str, int]:
    """Estimate the scratch bytes of each call: the tensors alive at the worst moment.

    The rules were fitted to what TensorRT-RTX reports; `tests/runtime/test_plan.py` has the bounds.
    Each call has a workspace besides.

    - denoiser: one layer's keys and values, new and context joined; in the feed-forward layer, the
      expanded new tokens and two tensors of the model's width.
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
