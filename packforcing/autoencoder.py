"""The tiny video autoencoder, in TAEHV's layout: causal, streaming, one latent frame per call.

Layer indices and names are those of the public `taew2_1` weights (madebyollin/taehv), so that a
state dict of that family loads as it is. Four pixel frames make one latent frame. All memory of
the past is explicit: each `MemBlock` reads its own input of one time step earlier, at its own
frame rate, and the caller carries these tensors from call to call (zeros before the first).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packforcing.config import TEMPORAL_FACTOR, Config

State = list[Tensor]  # one [1, channels, height, width] per MemBlock, in layer order

# Standard deviation and mean of the latents of Wan's VAE, per channel (vae.py of Wan2.1, and the
# defaults of diffusers' AutoencoderKLWan). Models work with normalized latents.
LATENT_STD = torch.tensor((
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
))[:, None, None]  # fmt: skip
LATENT_MEAN = torch.tensor((
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
))[:, None, None]  # fmt: skip


def denormalize_latents(latents: Tensor) -> Tensor:
    """Return a model's latents [..., C, h, w] in the scale of Wan's VAE."""
    return latents * LATENT_STD.to(latents) + LATENT_MEAN.to(latents)


def normalize_latents(latents: Tensor) -> Tensor:
    """Return latents of Wan's VAE [..., C, h, w] with mean 0 and variance 1."""
    return (latents - LATENT_MEAN.to(latents)) / LATENT_STD.to(latents)


def _conv(inputs: int, outputs: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)


class Clamp(nn.Module):
    """Soft limit of the latents, 3 tanh(x / 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """Residual block over a frame and the frame before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat((x, past), 1)) + x)


class TPool(nn.Module):
    """Merges `stride` consecutive frames into one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, self.stride * x.shape[1], *x.shape[2:]))


class TGrow(nn.Module):
    """Splits a frame into `stride` consecutive frames."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, x.shape[1], *x.shape[2:])


class TinyAutoencoder(nn.Module):
    """Encoder and decoder; `encode_frame` and `decode_frame` are the streaming steps."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self._denormalized = config.vae == "lighttae"  # its latents have the scale of Wan's VAE
        pixels = 3 * config.vae_patch**2
        latent = config.latent_channels
        e = config.vae_encoder_width
        a, b, c, d = config.vae_decoder_widths
        stages: list[nn.Module] = []
        for stride in (2, 2, 1):
            stages += [TPool(e, stride), _conv(e, e, stride=2, bias=False)]
            stages += [MemBlock(e) for _ in range(3)]
        self.encoder = nn.Sequential(_conv(pixels, e), nn.ReLU(), *stages, _conv(e, latent))
        self.decoder = nn.Sequential(
            Clamp(), _conv(latent, a), nn.ReLU(),
            MemBlock(a), MemBlock(a), MemBlock(a), nn.Upsample(scale_factor=2), TGrow(a, 1),
            _conv(a, b, bias=False),
            MemBlock(b), MemBlock(b), MemBlock(b), nn.Upsample(scale_factor=2), TGrow(b, 2),
            _conv(b, c, bias=False),
            MemBlock(c), MemBlock(c), MemBlock(c), nn.Upsample(scale_factor=2), TGrow(c, 2),
            _conv(c, d, bias=False), nn.ReLU(), _conv(d, pixels),
        )  # fmt: skip

    def decode_frame(self, latent: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode one latent frame [1, C, h, w] to pixel frames [4, 3, H, W] in 0..1.

        Returns:
            The frames, and the state for the next call.
        """
        latent = denormalize_latents(latent) if self._denormalized else latent
        layers = list(self.decoder)
        last = max(i for i, layer in enumerate(layers) if isinstance(layer, MemBlock)) + 1
        x, state = _run_stream(layers[:last], latent, state)
        x = _in_strips(nn.Sequential(*layers[last:]), x, self.config.vae_strips)
        return F.pixel_shuffle(x, self.config.vae_patch).clamp(0, 1), state

    def encode_frame(self, frames: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode pixel frames [4, 3, H, W] in 0..1 to one latent frame [1, C, h, w].

        Returns:
            The latent frame, and the state for the next call.
        """
        x, state = _run_stream(
            self.encoder, F.pixel_unshuffle(frames, self.config.vae_patch), state
        )
        return normalize_latents(x) if self._denormalized else x, state

    def decoder_state(self) -> State:
        """Return the state before the first latent frame."""
        h, w = self.config.latent_size
        return [
            torch.zeros(1, width, h * scale, w * scale)
            for width, scale in zip(self.config.vae_decoder_widths[:3], (1, 2, 4))
            for _ in range(3)
        ]

    def encoder_state(self, height: int, width: int) -> State:
        """Return the state before the first frame of a video of this size in pixels."""
        p, e = self.config.vae_patch, self.config.vae_encoder_width
        return [
            torch.zeros(1, e, height // (p * scale), width // (p * scale))
            for scale in (2, 4, 8)
            for _ in range(3)
        ]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode a whole clip [B, T, C, h, w] to [B, 4T, 3, H, W], from an empty past."""
        latents = denormalize_latents(latents) if self._denormalized else latents
        x = _run_clip(self.decoder, latents.flatten(0, 1), latents.shape[0])
        x = F.pixel_shuffle(x, self.config.vae_patch)
        return x.unflatten(0, (latents.shape[0], -1))

    def encode(self, frames: Tensor) -> Tensor:
        """Encode a whole clip [B, 4T, 3, H, W] to [B, T, C, h, w], from an empty past."""
        assert frames.shape[1] % TEMPORAL_FACTOR == 0
        x = F.pixel_unshuffle(frames.flatten(0, 1), self.config.vae_patch)
        x = _run_clip(self.encoder, x, frames.shape[0]).unflatten(0, (frames.shape[0], -1))
        return normalize_latents(x) if self._denormalized else x


def _run_stream(layers: Iterable[nn.Module], x: Tensor, state: State) -> tuple[Tensor, State]:
    """Run layers on frames along the first axis, all of one video."""
    pasts = iter(state)
    after: State = []
    for layer in layers:
        if isinstance(layer, MemBlock):
            past = torch.cat((next(pasts), x[:-1])) if x.shape[0] > 1 else next(pasts)
            after.append(x[-1:])
            x = layer(x, past)
        else:
            x = layer(x)
    return x, after


def _in_strips(stage: nn.Sequential, x: Tensor, strips: int) -> Tensor:
    """Run the last stage, [n, c, h, w] to [m, C, 2h, 2w], frame by frame in horizontal strips.

    At full resolution this stage needs more memory than all others together. The result is exact:
    its two convolutions reach two rows of its output, one of its input, past a strip's edge.
    """
    if strips == 1:
        return stage(x)
    rows = x.shape[2]
    cuts = sorted({rows * i // strips for i in range(strips + 1)})  # never more than rows
    frames = []
    for frame in x.split(1):
        parts = []
        for first, end in pairwise(cuts):
            above, below = int(first > 0), int(end < rows)
            part = stage(frame[:, :, first - above : end + below])
            parts.append(part[:, :, 2 * above : part.shape[2] - 2 * below])
        frames.append(torch.cat(parts, 2))
    return torch.cat(frames)


def _run_clip(layers: nn.Sequential, x: Tensor, batch: int) -> Tensor:
    """Run layers on frames of `batch` videos along the first axis, each from an empty past."""
    for layer in layers:
        if isinstance(layer, MemBlock):
            clip = x.unflatten(0, (batch, -1))
            past = F.pad(clip, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
            x = layer(x, past.flatten(0, 1))
        else:
            x = layer(x)
    return x
