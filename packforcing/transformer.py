"""The causal Wan video transformer (Wan2.1 / Self-Forcing: causal_model.py), one block per call.

Parameters and names are those of the public checkpoints. The inputs of a call differ: keys come in
and go out *before* RoPE, cross-attention keys and values are computed once per prompt (`cross_kv`),
and position tables are inputs. So one function serves a step, a commit and a mid pass, and exports
as one graph.

Tokens are in input-patch order (channel, row, column) on both sides. In checkpoints the channel is
the fastest axis of the head's rows: they are reordered when a state dict is loaded, and back when
one is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packforcing.config import Config

KV = tuple[Tensor, Tensor]  # keys and values of one layer, [B, H, n, d], keys before RoPE
Rope = tuple[Tensor, Tensor]  # cos and sin, [n, d / 2]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v (before RoPE) to the output


def patchify(latents: Tensor, patch: int) -> Tensor:
    """Cut latents [B, F, C, h, w] into tokens [B, F h/p w/p, C p p]."""
    b, f, c, h, w = latents.shape
    x = latents.reshape(b, f, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 1, 3, 5, 2, 4, 6).reshape(b, -1, c * patch * patch)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Assemble tokens [B, F h w, C p p] on an h x w grid to latents [B, F, C, h p, w p]."""
    h, w = grid
    x = tokens.reshape(tokens.shape[0], -1, h, w, tokens.shape[-1] // patch**2, patch, patch)
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate adjacent channel pairs of [B, H, n, d] by the tables' angles."""
    cos, sin = rope
    if torch.compiler.is_exporting():  # one ONNX op instead of a dozen
        return torch.onnx.ops.rotary_embedding(x, cos[None], sin[None], interleaved=True)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def attention(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None = None) -> Tensor:
    """Compute softmax attention over the first `kv_len` keys (None: all), [B, H, n, d]."""
    if torch.compiler.is_exporting():
        # ONNX keeps the shapes constant and carries the length. The casts around the op make
        # TensorRT accumulate in fp32, as torch's kernels do.
        length = () if kv_len is None else (None, None, None, kv_len)
        return torch.onnx.ops.symbolic(
            "Attention",
            (q.float(), k.float(), v.float(), *length),
            {"scale": q.shape[-1] ** -0.5},
            dtype=torch.float32,
            shape=q.shape,
            version=24,
        ).to(q.dtype)
    n = k.shape[2] if kv_len is None else int(kv_len)
    return F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n])


class Attention(nn.Module):
    """Projections of self- or cross-attention; queries and keys are normalized over all heads."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def query(self, x: Tensor) -> Tensor:
        return self._split(self.norm_q(self.q(x)))

    def key_value(self, x: Tensor) -> KV:
        return self._split(self.norm_k(self.k(x))), self._split(self.v(x))

    def out(self, x: Tensor) -> Tensor:
        return self.o(x.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """One transformer block: modulated self-attention, cross-attention, modulated FFN."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim, self.eps = config.dim, config.eps
        self.self_attn = Attention(dim, config.heads, config.eps)
        self.cross_attn = Attention(dim, config.heads, config.eps)
        self.norm3 = nn.LayerNorm(dim, config.eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor, cross: KV, attend: Attend) -> Tensor:
        """Map x [B, n, D]; time is [B, n or 1, 6 D], cross the prompt's keys and values."""
        modulation = self.modulation.flatten(1) + time
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.chunk(6, -1)
        h = modulate(x, shift_a, scale_a, self.eps)
        attended = attend(self.self_attn.query(h), *self.self_attn.key_value(h))
        x = x + gate_a * self.self_attn.out(attended)
        query = self.cross_attn.query(self.norm3(x))
        x = x + self.cross_attn.out(attention(query, *cross))
        return x + gate_f * self.ffn(modulate(x, shift_f, scale_f, self.eps))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Apply layer norm without weights, then the timestep's scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


class Head(nn.Module):
    """Final modulation and projection to the flow of each token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, config.token_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        rows = head_rows(config)
        self.register_load_state_dict_pre_hook(_reorder_rows(rows))
        self.register_state_dict_post_hook(_reorder_rows(rows.argsort()))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Map x [B, n, D] to the flow [B, n, P]; time is [B, n or 1, D]."""
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps))


def head_rows(config: Config) -> Tensor:
    """Return the checkpoint's row of each head row in token order, int64 [P]."""
    with torch.device("cpu"):
        return torch.arange(config.token_dim).reshape(config.patch**2, -1).T.flatten()


def _reorder_rows(rows: Tensor) -> Callable[..., None]:
    def hook(module: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
        for name in (f"{prefix}head.weight", f"{prefix}head.bias"):
            if name in state:
                state[name] = state[name][rows.to(state[name].device)]

    return hook


class Transformer(nn.Module):
    """Predicts the flow of one block, conditioned on the keys and values of its history."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        patch = (1, config.patch, config.patch)
        self.config = config
        self.patch_embedding = nn.Conv3d(config.latent_channels, dim, patch, patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks: Iterable[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config) for _ in range(config.layers)
        )
        self.head = Head(config)

    def cross_kv(self, text: Tensor) -> list[KV]:
        """Compute each layer's cross-attention keys and values of a prompt.

        Args:
            text: Rows of the embedding, [B, T or fewer, text_dim]. They are zero-padded to T;
                padding is not masked, as in Wan.

        Returns:
            Per layer, keys and values [B, H, T, d].
        """
        text = F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1]))
        embedded = self.text_embedding(text)
        return [layer.cross_attn.key_value(embedded) for layer in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        extra: Tensor,
        timestep: Tensor,
        cross: list[KV],
        rope: Rope,
        context: list[KV],
        context_rope: Rope,
        kv_len: Tensor | None = None,
    ) -> tuple[Tensor, list[KV], Tensor, Tensor]:
        """Call the network on n new tokens and C context tokens.

        Args:
            tokens: [B, n, P].
            extra: [B, n, D], added after the patch embedding.
            timestep: [B], from 0 to 1000.
            cross: Of `cross_kv`.
            rope: Tables of the new tokens.
            context: Per layer, keys before RoPE and values [B, H, C, d].
            context_rope: Tables of the context.
            kv_len: int64 [1], n + valid context tokens. None: all are valid.

        Returns:
            The flow [B, n, P], the new keys (before RoPE) and values per layer, and the means over
            the n tokens of queries and of keys before RoPE, [B, L, H, d].
        """
        new: list[KV] = []
        pooled: list[KV] = []
        past = iter(context)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            old_k, old_v = next(past)
            new.append((k, v))
            pooled.append((q.mean(2).float(), k.mean(2).float()))
            # rotated separately: joined tables would occupy a graph's scratch throughout
            keys = torch.cat((rotate(k, rope), rotate(old_k, context_rope)), 2)
            return attention(rotate(q, rope), keys, torch.cat((v, old_v), 2), kv_len)

        flow = self.run(tokens, extra, *self.embed_time(timestep[:, None]), cross, attend)
        q_pool, k_pool = (torch.stack(pool, 1) for pool in zip(*pooled))
        return flow, new, q_pool, k_pool

    def embed(self, tokens: Tensor) -> Tensor:
        """Apply the patch embedding to tokens instead of a grid: [B, n, P] to [B, n, D]."""
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(tokens.to(weight.dtype), weight, self.patch_embedding.bias)

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Embed timesteps [B, G] for the head [B, G, D] and for the layers [B, G, 6 D]."""
        half = self.config.freq_dim // 2
        frequencies = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = timestep[..., None] * frequencies.to(timestep)  # up to 1000: too coarse in fp16
        waves = torch.cat((angles.cos(), angles.sin()), -1)
        time = self.time_embedding(waves.to(self.patch_embedding.weight.dtype))
        return time, self.time_projection(time)

    def run(
        self,
        tokens: Tensor,
        extra: Tensor | None,
        head_time: Tensor,
        layer_time: Tensor,
        cross: list[KV],
        attend: Attend,
    ) -> Tensor:
        """Run the network around a self-attention that the caller supplies.

        That is attention to a cache or, in training, under a mask over many blocks at once.

        Args:
            tokens: [B, n, P].
            extra: [B, n, D], or None for zeros.
            head_time: Of `embed_time`, [B, n or 1, D].
            layer_time: Of `embed_time`, [B, n or 1, 6 D].
            cross: Of `cross_kv`.
            attend: Called once per layer, in order, with q, k and v before RoPE.

        Returns:
            The flow, [B, n, P].
        """
        x = self.embed(tokens)
        x = x if extra is None else x + extra
        for layer, layer_cross in zip(self.blocks, cross):
            x = layer(x, layer_time, layer_cross, attend)
        return self.head(x, head_time).float()
