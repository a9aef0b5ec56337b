"""Wan's video autoencoder as a stream: the network of `diffusers`, its memory made explicit.

diffusers decodes a latent frame at a time and keeps the last two inputs of every convolution over
time in a list. That list is the state here, and zeros in it are an empty past. What remains is
that a video's first latent frame stands for one pixel frame and not for four: the changes of frame
rate pass it by, and it is no past to them later. So that the first call is a call like all others,
the state ends in a number, 0 before the first frame and 1 ever after. While it is 0, the frames
before the last are silent wherever a convolution could hear them, a change of rate gives what it
was given, and the decoder repeats its one frame four times. Both ways are exact: the rest is
multiplied by one.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
    WanUpsample,
)
from torch import Tensor, nn

from packforcing.autoencoder import State, normalise, restore
from packforcing.config import TEMPORAL_FACTOR, Config


class Norm(WanRMS_norm):
    """The same with nothing but lengths in float32: frames in float32 take a quarter of all the
    scratch of an engine."""

    def forward(self, x: Tensor) -> Tensor:
        least = max(1e-12, self.scale / torch.finfo(x.dtype).max)  # so that 0 gives 0
        length = x.float().norm(dim=1, keepdim=True).clamp(min=least)
        return x * (self.scale / length).to(x.dtype) * self.gamma


class Attention(WanAttentionBlock):
    """The same written out: its one head is wider than fused attention takes."""

    def forward(self, x: Tensor) -> Tensor:
        frames = self.norm(x.transpose(1, 2).flatten(0, 1))
        q, k, v = self.to_qkv(frames).flatten(2).transpose(1, 2).chunk(3, -1)
        scores = (q * self.dim**-0.5) @ k.transpose(1, 2)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).unflatten(2, frames.shape[2:])
        return x + self.proj(mixed).unflatten(0, (-1, x.shape[2])).transpose(1, 2)


class WanAutoencoder(nn.Module):
    """Encoder and decoder; weights have diffusers' names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        widths = config.vae_decoder_widths
        vae = AutoencoderKLWan(
            base_dim=config.vae_encoder_width,
            decoder_base_dim=widths[-1],
            z_dim=config.latent_channels,
            dim_mult=[width // widths[-1] for width in widths[::-1]],
        )
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self._started: Tensor | None = None  # in a call of the stream, whether it is not the first
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.SiLU):
                    module.register_forward_hook(self._hush)
                elif isinstance(module, WanRMS_norm):
                    module.__class__ = Norm
                elif isinstance(module, WanAttentionBlock):
                    module.__class__ = Attention
                elif isinstance(module, WanResample):
                    if isinstance(module.resample[0], WanUpsample):  # copies by way of float32
                        module.resample[0] = nn.Upsample(scale_factor=2)
                    if hasattr(module, "time_conv"):
                        module.time_conv.register_forward_hook(self._keep_rate)

    def decode_frame(self, latent: Tensor, state: State) -> tuple[Tensor, State]:
        """One latent frame [1, C, h, w] to four frames [4, 3, H, W] in 0..1, and the new state."""
        *memory, started = state
        latent = self.post_quant_conv(restore(latent)[:, :, None])
        frames = self._run(self.decoder, latent, memory, started)[0].transpose(0, 1)
        frames = (frames / 2 + 0.5).clamp(0, 1)
        frames = started * frames + (1 - started) * frames[-1:]
        # the first frame is no past to the first change of rate
        memory = [
            past * started if name.endswith("time_conv") else past
            for name, past in zip(_convs(self.decoder), memory)
        ]
        return frames, [*memory, _next(started)]

    def encode_frame(self, frames: Tensor, state: State) -> tuple[Tensor, State]:
        """Four frames [4, 3, H, W] in 0..1 to one latent frame [1, C, h, w], and the new state.

        Of a video's first four the last alone is seen.
        """
        *memory, started = state
        frames = _silenced((2 * frames - 1).transpose(0, 1)[None], started)
        latent = self._run(self.encoder, frames, memory, started)
        return self._normalised(latent)[:, :, 0], [*memory, _next(started)]

    def encode(self, frames: Tensor) -> Tensor:
        """A whole clip at once, [B, 4T, 3, H, W] to [B, T, C, h, w], from an empty past."""
        memory = [None] * len(_convs(self.encoder))
        first, *later = (2 * frames - 1).transpose(1, 2).split(TEMPORAL_FACTOR, 2)
        latents = [
            self._run(self.encoder, part, memory, None) for part in (first[:, :, -1:], *later)
        ]
        return self._normalised(torch.cat(latents, 2)).transpose(1, 2)

    def decoder_state(self) -> State:
        """The state before the first latent frame."""
        latent = torch.empty(1, self.config.latent_channels, 1, *self.config.latent_size)
        return _empty(self.decoder, [latent] * 3)

    def encoder_state(self, height: int, width: int) -> State:
        """The state before the first frame of a video of this many pixels."""
        frames = torch.empty(1, 3, TEMPORAL_FACTOR, height, width)
        return _empty(self.encoder, [frames[:, :, -1:], frames])

    def _run(self, part: nn.Module, x: Tensor, memory: list, started: Tensor | None) -> Tensor:
        """Frames [B, channels, T, h, w] through one half, which changes `memory`."""
        self._started = started
        try:
            return part(x, feat_cache=memory, feat_idx=[0])
        finally:
            self._started = None

    def _normalised(self, latents: Tensor) -> Tensor:
        """What the encoder gives, [B, 2 C, T, h, w], as the latents [B, C, T, h, w] of a model."""
        means = self.quant_conv(latents)[:, : self.config.latent_channels]
        return normalise(means.transpose(1, 2)).transpose(1, 2)

    def _hush(self, module: nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor:
        """Silences what was before a video's first frame, ahead of a convolution over time."""
        return x if self._started is None else _silenced(x, self._started)

    def _keep_rate(self, conv: WanCausalConv3d, inputs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """Lets a video's first frame past a change of rate: x as if two frames were alike."""
        started, given = self._started, inputs[0]
        if started is None:
            return x
        faster = conv.out_channels > conv.in_channels  # a frame makes two, one after the other
        kept = torch.cat((given, given), 1) if faster else given[:, :, 2::2]
        return started * x + (1 - started) * kept


def _convs(part: nn.Module) -> dict[str, WanCausalConv3d]:
    """The convolutions over time, in the order in which they are run and remember."""
    return {
        name: module
        for name, module in part.named_modules()
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1
    }


def _empty(part: nn.Module, calls: list[Tensor]) -> State:
    """Zeros like what `part` remembers after these calls, which take no memory themselves."""
    meta = {name: weight.to("meta") for name, weight in part.state_dict().items()}
    memory: list = [None] * len(_convs(part))
    for x in calls:
        inputs = {"feat_cache": memory, "feat_idx": [0]}
        torch.func.functional_call(part, meta, (x.to("meta"),), inputs)
    return [torch.zeros(past.shape) for past in memory] + [torch.zeros(1)]


def _silenced(x: Tensor, started: Tensor) -> Tensor:
    """All frames of x [B, C, T, h, w] but the last, if the video starts with that."""
    before = x.shape[2] - 1
    if not before:
        return x
    return x * torch.cat((*[started] * before, torch.ones_like(started)))[:, None, None]


def _next(started: Tensor) -> Tensor:
    return (started + 1).clamp(0, 1)
