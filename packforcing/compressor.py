"""The dual-branch compressor: a clean block to a few tokens (paper, section 3.3, Figure 2d).

High branch: strided convolutions over the latents. Low branch: pooled pixels through the
autoencoder's encoder and the transformer's own patch embedding. Their sum, formed inside the
transformer, is the compressed block. Without weights for the high branch the low branch is used
alone, training-free.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packforcing.config import TEMPORAL_FACTOR, Config
from packforcing.transformer import patchify

# The paper's strides. Kernel = stride: no other kernel gives its 182 tokens at 480x832.
STRIDES = ((2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))


class Compressor(nn.Module):
    """Maps latents and pixels of a block to `tokens` and `extra`, inputs of the denoiser."""

    def __init__(self, config: Config, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.config = config
        self.encode = encode  # a bound method, so that its weights are not registered here
        channels = (config.latent_channels, *config.compressor_widths)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in zip(channels, channels[1:], STRIDES):
            layers += [nn.Conv3d(inputs, outputs, stride, stride), nn.SiLU()]
        if layers:
            layers.append(nn.Conv3d(channels[-1], config.dim, 1))
        self.high = nn.Sequential(*layers)

    def forward(self, latents: Tensor | None, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Compress a block.

        An odd number of latent frames is padded by repeating the last one.

        Args:
            latents: [B, B_f, C, h, w]. Not read without a high branch.
            pixels: The same block decoded, [B, 4 B_f, 3, H, W] in 0..1.

        Returns:
            tokens [B, N_c, P] and extra [B, N_c, D]; extra is zero without a high branch.
        """
        tokens = self.low_branch(pixels)
        if not self.high:
            return tokens, tokens.new_zeros(*tokens.shape[:2], self.config.dim)
        assert latents is not None
        return tokens, self.high_branch(latents)

    def low_branch(self, pixels: Tensor) -> Tensor:
        """Map the pixels of a block to tokens [B, N_c, P]."""
        if self.config.block_frames % 2:
            pixels = _repeat_last(pixels, TEMPORAL_FACTOR)
        _, rows, columns = self.config.compressed_grid
        small = F.avg_pool3d(pixels.transpose(1, 2), (2, 4, 4)).transpose(1, 2)
        if ahead := self.config.lookahead_frames:
            small = _repeat_last(small[:, ahead:], ahead)
        patch = self.config.patch
        latents = self.encode(small)[..., : rows * patch, : columns * patch]
        return patchify(latents, patch)

    def high_branch(self, latents: Tensor) -> Tensor:
        """Map the latents of a block to features [B, N_c, D]."""
        if self.config.block_frames % 2:
            latents = _repeat_last(latents, 1)
        return self.high(latents.transpose(1, 2)).flatten(2).transpose(1, 2)


def _repeat_last(x: Tensor, times: int) -> Tensor:
    return torch.cat((x, *[x[:, -1:]] * times), 1)
