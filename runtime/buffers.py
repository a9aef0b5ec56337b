"""The arrays of `packforcing.runtime.allocations`, allocated once and named as graphs name them."""

from __future__ import annotations

import math

from packforcing.config import TEMPORAL_FACTOR, Config
from packforcing.runtime.allocations import Allocation, allocations, encoder_allocations
from packforcing.runtime.device import Array, HostDevice

Arrays = dict[str, Array]


class Buffers:
    """The fixed arrays that graphs read and write, and the context.

    Attributes:
        context: Keys and values of the history, [L, 2, 1, H, C, d].
        new: Keys and values of the current block, [L, 2, 1, H, N, d].
        new_compressed: The same of its compressed form.
        cross: Keys and values of the prompt, [L, 2, 1, H, T, d].
        text: Embedding of the prompt, [1, T, text_dim].
        recent: Clean tokens of the recent blocks, block b in row b % recent.
        latents: Latents of the current block, [1, B_f, C, h, w].
        pixels: Its frames, [1, 4 B_f, 3, H, W] in 0..1.
        prompt, denoiser, mid_pass, compressor, encoder: Arrays of each call, by tensor. `encoder`
            is None where the policy never restarts.
        decoder: Arrays of the decoder's calls, in turn.
    """

    def __init__(self, config: Config, device: HostDevice) -> None:
        self._device = device
        arrays = {entry.name: _allocate(entry, device) for entry in allocations(config)}
        self.context, self.cross = arrays["context"], arrays["cross_attention"]
        self.new, self.new_compressed = arrays["staging.block"], arrays["staging.compressed"]
        self.text, self.recent = arrays["text"], arrays["recent"].host
        cross = _by_layer("cross_{}", self.cross)
        self.prompt = {"text": self.text, **{name: cross[name].on_host() for name in cross}}
        self.compressor = _of_call("compressor", arrays)
        shared = {**cross, **_by_layer("{}_ctx", self.context)}
        self.denoiser = {
            **shared,
            **_by_layer("{}_new", self.new),
            **_of_call("denoiser", arrays),
        }
        self.mid_pass = {
            **shared,
            **_by_layer("{}_new", self.new_compressed),
            **_of_call("mid_pass", arrays),
            **{name: self.denoiser[name] for name in ("ctx_cos", "ctx_sin")},
            **{name: self.compressor[name] for name in ("tokens", "extra")},
        }
        self.latents = self.compressor.get("latents") or arrays["latents"]
        self.pixels = self.compressor["pixels"]
        # The tokens' memory seen as latents: what patchify and its inverse copy through.
        frames, (rows, columns), p = config.block_frames, config.grid, config.patch
        grid = (frames, rows, columns, config.latent_channels, p, p)
        self.tokens_as_latents = (
            self.denoiser["tokens"].host.reshape(grid).transpose(0, 3, 1, 4, 2, 5)
        )
        self.latents_as_patches = self.latents.host.reshape(frames, -1, rows, p, columns, p)
        states = [list(_of_call(f"decoder.{turn}", arrays).values()) for turn in range(2)]
        self.decoder_state = states[0]
        self.decoder = self._decoder_calls(config, states)
        self.encoder = _of_call("encoder", arrays) if config.policy.restart else None
        # A NaN beyond the valid part of the context would spread through 0 * NaN, and so would
        # one in a position table. The mid pass is always at timestep 0.
        for name in ("ctx_cos", "ctx_sin"):
            self.denoiser[name].host[...] = 0
        device.zero(self.denoiser["extra"])
        device.zero(self.mid_pass["timestep"])

    def clear(self) -> None:
        """Forget the previous video: context and decoder state."""
        for array in (self.context, *self.decoder_state):
            self._device.zero(array)

    def _decoder_calls(self, config: Config, states: list[list[Array]]) -> list[Arrays]:
        """Return the arrays of the decoder's calls, latent frame after latent frame.

        State goes back and forth between two sets, and each call reads its latent and writes
        its frames where they belong: nothing is copied.
        """
        count = config.block_frames
        latents = self.latents.reshape(count, 1, *self.latents.shape[2:])
        frames = self.pixels.reshape(count, TEMPORAL_FACTOR, *self.pixels.shape[2:])
        return [
            {
                "latent": latents[call % count],
                "frames": frames[call % count],
                **{f"state.{i}": array for i, array in enumerate(states[call % 2])},
                **{f"new_state.{i}": array for i, array in enumerate(states[1 - call % 2])},
            }
            for call in range(math.lcm(count, 2))
        ]


def encoder_arrays(config: Config, device: HostDevice) -> Arrays:
    """Allocate what the graph `vae_encoder` reads and writes, on the host."""
    return _of_call(
        "encoder", {entry.name: _allocate(entry, device) for entry in encoder_allocations(config)}
    )


def _allocate(entry: Allocation, device: HostDevice) -> Array:
    place = device if entry.place == "device" else device.host
    return place.allocate(entry.purpose, entry.shape, entry.dtype, host=entry.host_view)


def _of_call(call: str, arrays: Arrays) -> Arrays:
    """Select the arrays of a call, by the names of its tensors."""
    return {
        name.removeprefix(f"{call}."): array
        for name, array in arrays.items()
        if name.startswith(f"{call}.")
    }


def _by_layer(name: str, stacked: Array) -> Arrays:
    """Return stacked keys and values by layer: of "{}_ctx", k_ctx.0, v_ctx.0 and so on."""
    return {
        f"{name.format(kind)}.{layer}": stacked[layer, i]
        for layer in range(stacked.shape[0])
        for i, kind in enumerate("kv")
    }
