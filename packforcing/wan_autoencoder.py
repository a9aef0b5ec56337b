"""Wan's video autoencoder as a stream: the network of `diffusers`, its memory made explicit.

diffusers decodes one latent frame at a time and keeps the last two inputs of every convolution
over time in a list. That list is the state here; zeros in it are an empty past.

A video's first latent frame stands for one pixel frame instead of four: the layers that change the
frame rate skip it, and it is not part of their past later. So that the first call is a call like
all others, the state ends with a number, 0 before the first frame and 1 from then on. While it is
0, the frames before the last are set to zero in front of every convolution over time, a change of
frame rate returns its input, and the decoder repeats its one frame four times. Both cases are
exact: all else is multiplied by one.
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

from packforcing.autoencoder import State, denormalize_latents, normalize_latents
from packforcing.config import TEMPORAL_FACTOR, Config


class Norm(WanRMS_norm):
    """The same norm, with float32 for the lengths alone.

    Frames in float32 would take a quarter of an engine's scratch.
    """

    def forward(self, x: Tensor) -> Tensor:
        smallest = max(1e-12, self.scale / torch.finfo(x.dtype).max)  # so that 0 is mapped to 0
        length = x.float().norm(dim=1, keepdim=True).clamp(min=smallest)
        return x * (self.scale / length).to(x.dtype) * self.gamma


class Attention(WanAttentionBlock):
    """The same attention written out: its one head is wider than fused kernels support."""

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
        self._started: Tensor | None = None  # in a streaming call: 0 for the first, else 1
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.SiLU):
                    module.register_forward_hook(self._silence_past)
                elif isinstance(module, WanRMS_norm):
                    module.__class__ = Norm
                elif isinstance(module, WanAttentionBlock):
                    module.__class__ = Attention
                elif isinstance(module, WanResample):
                    if isinstance(module.resample[0], WanUpsample):  # it casts to float32
                        module.resample[0] = nn.Upsample(scale_factor=2)
                    if hasattr(module, "time_conv"):
                        module.time_conv.register_forward_hook(self._keep_rate)

    def decode_frame(self, latent: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode one latent frame [1, C, h, w] to pixel frames [4, 3, H, W] in 0..1.

        Returns:
            The frames, and the state for the next call.
        """
        *memory, started = state
        latent = self.post_quant_conv(denormalize_latents(latent)[:, :, None])
        frames = self._run(self.decoder, latent, memory, started)[0].transpose(0, 1)
        frames = (frames / 2 + 0.5).clamp(0, 1)
        frames = started * frames + (1 - started) * frames[-1:]
        # the first frame is not part of the past of the first change of frame rate
        memory = [
            past * started if name.endswith("time_conv") else past
            for name, past in zip(_convs(self.decoder), memory)
        ]
        return frames, [*memory, _next(started)]

    def encode_frame(self, frames: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode pixel frames [4, 3, H, W] in 0..1 to one latent frame [1, C, h, w].

        Of a video's first four frames only the last is read.

        Returns:
            The latent frame, and the state for the next call.
        """
        *memory, started = state
        frames = _silenced((2 * frames - 1).transpose(0, 1)[None], started)
        latent = self._run(self.encoder, frames, memory, started)
        return self._normalized_means(latent)[:, :, 0], [*memory, _next(started)]

    def encode(self, frames: Tensor) -> Tensor:
        """Encode a whole clip [B, 4T, 3, H, W] to [B, T, C, h, w], from an empty past."""
        memory = [None] * len(_convs(self.encoder))
        first, *later = (2 * frames - 1).transpose(1, 2).split(TEMPORAL_FACTOR, 2)
        latents = [
            self._run(self.encoder, part, memory, None) for part in (first[:, :, -1:], *later)
        ]
        return self._normalized_means(torch.cat(latents, 2)).transpose(1, 2)

    def decoder_state(self) -> State:
        """Return the state before the first latent frame."""
        latent = torch.empty(1, self.config.latent_channels, 1, *self.config.latent_size)
        return _empty(self.decoder, [latent] * 3)

    def encoder_state(self, height: int, width: int) -> State:
        """Return the state before the first frame of a video of this size in pixels."""
        frames = torch.empty(1, 3, TEMPORAL_FACTOR, height, width)
        return _empty(self.encoder, [frames[:, :, -1:], frames])

    def _run(self, part: nn.Module, x: Tensor, memory: list, started: Tensor | None) -> Tensor:
        """Run frames [B, channels, T, h, w] through one half, which updates `memory`."""
        self._started = started
        try:
            return part(x, feat_cache=memory, feat_idx=[0])
        finally:
            self._started = None

    def _normalized_means(self, latents: Tensor) -> Tensor:
        """Return the encoder's output [B, 2 C, T, h, w] as a model's latents [B, C, T, h, w]."""
        means = self.quant_conv(latents)[:, : self.config.latent_channels]
        return normalize_latents(means.transpose(1, 2)).transpose(1, 2)

    def _silence_past(self, module: nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor:
        """Set frames before a video's first one to zero, in front of a convolution over time."""
        return x if self._started is None else _silenced(x, self._started)

    def _keep_rate(self, conv: WanCausalConv3d, inputs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        """Let a video's first frame skip a change of frame rate."""
        started, frames = self._started, inputs[0]
        if started is None:
            return x
        upsamples = conv.out_channels > conv.in_channels  # makes two frames of one, as channels
        skipped = torch.cat((frames, frames), 1) if upsamples else frames[:, :, 2::2]
        return started * x + (1 - started) * skipped


def _convs(part: nn.Module) -> dict[str, WanCausalConv3d]:
    """List the convolutions over time, in the order of their state."""
    return {
        name: module
        for name, module in part.named_modules()
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1
    }


def _empty(part: nn.Module, calls: list[Tensor]) -> State:
    """Return zeros of the shapes of a part's state after these calls, which run on meta tensors."""
    meta = {name: weight.to("meta") for name, weight in part.state_dict().items()}
    memory: list = [None] * len(_convs(part))
    for x in calls:
        inputs = {"feat_cache": memory, "feat_idx": [0]}
        torch.func.functional_call(part, meta, (x.to("meta"),), inputs)
    return [torch.zeros(past.shape) for past in memory] + [torch.zeros(1)]


def _silenced(x: Tensor, started: Tensor) -> Tensor:
    """Set all frames of x [B, C, T, h, w] but the last to zero, if it is the video's first."""
    before = x.shape[2] - 1
    if not before:
        return x
    return x * torch.cat((*[started] * before, torch.ones_like(started)))[:, None, None]


def _next(started: Tensor) -> Tensor:
    return (started + 1).clamp(0, 1)
