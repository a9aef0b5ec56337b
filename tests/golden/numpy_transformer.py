"""The causal Wan transformer in plain NumPy, float64: one call on the tokens of one block.

The names of the weights are those of the published Wan checkpoints, with a prefix per part, as in
`transformer.blocks.0.self_attn.q.weight`. The rows of the final projection `head.head` are in the
order of the checkpoint: pixel of the patch, then channel. Letters in shapes are those of
`numpy_rollout`; T is the number of text rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Weights = Mapping[str, Array]
KeyValue = tuple[Array, Array]  # keys before RoPE and values of one layer, [n, H, d] each

ROPE_BASE = 10000.0
TIME_BASE = 10000.0


@dataclass(frozen=True)
class Context:
    """What a call reads of the history: one entry per block."""

    key_values: list[list[KeyValue]]  # by block, then by layer
    positions: list[Array]  # by block, [n, 3]


@dataclass(frozen=True)
class Output:
    """What a call yields."""

    flow: Array  # [n, P], pixel of the patch slowest, channel fastest
    key_values: list[KeyValue]  # of the call's own tokens, by layer
    queries: list[Array]  # of the call's own tokens, by layer, [n, H, d] before RoPE


def transformer(
    weights: Weights,
    heads: int,
    eps: float,
    tokens: Array,
    timestep: float,
    positions: Array,
    cross: list[KeyValue],
    context: Context,
    features: Array | float = 0.0,
) -> Output:
    """Predict the flow of one block.

    Args:
        weights: Checkpoint names to arrays.
        heads: Attention heads.
        eps: Of every norm.
        tokens: Patches of the block, [n, P], channel slowest.
        timestep: 0 (clean) to 1000 (noise).
        positions: (time, row, column) of the tokens, [n, 3].
        cross: Keys and values of the text, by layer.
        context: Keys and values of the history.
        features: Added to the patch embedding, [n, D].

    Returns:
        The flow, and the queries, keys and values of the block.
    """
    embedding = weights["transformer.patch_embedding.weight"]
    x = tokens @ embedding.reshape(len(embedding), -1).T
    x = x + weights["transformer.patch_embedding.bias"] + features
    time = time_embedding(weights, timestep)
    layer_time = linear(silu(time), weights, "transformer.time_projection.1").reshape(6, -1)
    all_positions = np.concatenate((positions, *context.positions))

    key_values, all_queries = [], []
    for layer, (text_keys, text_values) in enumerate(cross):
        name = f"transformer.blocks.{layer}"
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
            weights[f"{name}.modulation"][0] + layer_time
        )

        h = layer_norm(x, eps) * (1 + scale) + shift
        queries = query(h, weights, f"{name}.self_attn", heads, eps)
        keys, values = key_value(h, weights, f"{name}.self_attn", heads, eps)
        key_values.append((keys, values))
        all_queries.append(queries)
        blocks = [(keys, values), *(block[layer] for block in context.key_values)]
        attended = attention(
            rotate(queries, positions),
            rotate(np.concatenate([keys for keys, _ in blocks]), all_positions),
            np.concatenate([values for _, values in blocks]),
        )
        x = x + gate * linear(attended, weights, f"{name}.self_attn.o")

        h = layer_norm(x, eps) * weights[f"{name}.norm3.weight"] + weights[f"{name}.norm3.bias"]
        queries = query(h, weights, f"{name}.cross_attn", heads, eps)
        attended = attention(queries, text_keys, text_values)
        x = x + linear(attended, weights, f"{name}.cross_attn.o")

        h = layer_norm(x, eps) * (1 + ffn_scale) + ffn_shift
        h = gelu(linear(h, weights, f"{name}.ffn.0"))
        x = x + ffn_gate * linear(h, weights, f"{name}.ffn.2")

    shift, scale = weights["transformer.head.modulation"][0] + time
    h = layer_norm(x, eps) * (1 + scale) + shift
    return Output(linear(h, weights, "transformer.head.head"), key_values, all_queries)


def cross_key_values(
    weights: Weights, text: Array, text_len: int, heads: int, eps: float
) -> list[KeyValue]:
    """Compute keys and values of a prompt, by layer, [T, H, d] each. Padding counts as text."""
    padded = np.zeros((text_len, text.shape[1]))
    padded[: len(text)] = text
    h = gelu(linear(padded, weights, "transformer.text_embedding.0"))
    h = linear(h, weights, "transformer.text_embedding.2")
    layers = sum(name.endswith(".cross_attn.k.weight") for name in weights)
    return [
        key_value(h, weights, f"transformer.blocks.{layer}.cross_attn", heads, eps)
        for layer in range(layers)
    ]


def time_embedding(weights: Weights, timestep: float) -> Array:
    """Embed a timestep, [D]: cosines, then sines at falling frequencies, through two layers."""
    half = weights["transformer.time_embedding.0.weight"].shape[1] // 2
    angles = timestep * TIME_BASE ** (-np.arange(half) / half)
    waves = np.concatenate((np.cos(angles), np.sin(angles)))
    h = silu(linear(waves, weights, "transformer.time_embedding.0"))
    return linear(h, weights, "transformer.time_embedding.2")


# Attention


def query(h: Array, weights: Weights, name: str, heads: int, eps: float) -> Array:
    """Compute queries of tokens [n, D], normalized over all heads, [n, H, d]."""
    q = rms_norm(linear(h, weights, f"{name}.q"), weights[f"{name}.norm_q.weight"], eps)
    return q.reshape(len(h), heads, -1)


def key_value(h: Array, weights: Weights, name: str, heads: int, eps: float) -> KeyValue:
    """Compute keys, normalized over all heads, and values of tokens [n, D], [n, H, d] each."""
    k = rms_norm(linear(h, weights, f"{name}.k"), weights[f"{name}.norm_k.weight"], eps)
    v = linear(h, weights, f"{name}.v")
    return k.reshape(len(h), heads, -1), v.reshape(len(h), heads, -1)


def rotate(x: Array, positions: Array) -> Array:
    """Apply RoPE to x [n, H, d] at positions [n, 3].

    Adjacent pairs of channels are complex numbers, multiplied by exp(i angle). The last two thirds
    (rounded down) are for row and column, what remains at the start is for time. Each axis has
    frequencies of its own: base^(-k / pairs).
    """
    pairs = x.shape[-1] // 2
    spatial = x.shape[-1] // 6
    angles = np.concatenate([
        positions[:, axis : axis + 1] * ROPE_BASE ** (-np.arange(count) / count)
        for axis, count in enumerate((pairs - 2 * spatial, spatial, spatial))
    ], axis=1)  # fmt: skip
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack((turned.real, turned.imag), -1).reshape(x.shape)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Compute softmax(q k / sqrt(d)) v, [n, D], of q [n, H, d], k and v [m, H, d]."""
    scores = np.einsum("ihd,jhd->hij", q, k, optimize=True) / np.sqrt(q.shape[-1])
    exponents = np.exp(scores - scores.max(-1, keepdims=True))
    shares = exponents / exponents.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", shares, v, optimize=True).reshape(len(q), -1)


# Patches


def to_tokens(latents: Array, patch: int) -> Array:
    """Cut latents [F, C, h, w] into patches [n, P]: channel slowest, as the embedding has it."""
    frames, channels, rows, columns = latents.shape
    x = latents.reshape(frames, channels, rows // patch, patch, columns // patch, patch)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * patch * patch)


def from_tokens(flow: Array, shape: tuple[int, ...], patch: int) -> Array:
    """Join the head's patches [n, P], channel fastest, to latents of a shape [F, C, h, w]."""
    frames, channels, rows, columns = shape
    x = flow.reshape(frames, rows // patch, columns // patch, patch, patch, channels)
    return x.transpose(0, 5, 1, 3, 2, 4).reshape(shape)


# Layers


def linear(x: Array, weights: Weights, name: str) -> Array:
    """Compute x W^T + b. A 1x1x1 convolution is one as well."""
    weight = weights[f"{name}.weight"]
    return x @ weight.reshape(len(weight), -1).T + weights[f"{name}.bias"]


def layer_norm(x: Array, eps: float) -> Array:
    """Scale to zero mean and unit variance over the channels, without weights."""
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Scale to a unit mean square over the channels, then by a weight for each."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    """Compute x sigmoid(x)."""
    return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """Compute x Phi(x) in its tanh form."""
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
