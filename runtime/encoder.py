"""Encode pixels to latents: the frames a video begins with, and CausVid's restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from packforcing.config import TEMPORAL_FACTOR, Config
from packforcing.runtime.backends import LoadedGraph
from packforcing.runtime.buffers import Arrays, encoder_arrays
from packforcing.runtime.device import HostDevice
from packforcing.runtime.request import start_blocks

Encode = Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]


def bind_encoder(graph: LoadedGraph, arrays: Arrays, before_call: Callable[[], None]) -> Encode:
    """Bind the graph `vae_encoder`.

    Args:
        graph: The graph, on the host.
        arrays: What `encoder_arrays` allocates.
        before_call: Called before each call of the graph; what it raises ends the encoding.

    Returns:
        A function that encodes a clip, beginning with an empty past. It takes frames
        [4, 3, H, W] in 0..1 per latent frame, or one [3, H, W] that stands for four, and yields
        latents [C, h, w], each of which the next one overwrites.
    """
    call = graph.bind(arrays)
    frames, latent = arrays["frames"].host, arrays["latent"].host
    states = [
        (array.host, arrays[f"new_{name}"].host)
        for name, array in arrays.items()
        if name.startswith("state.")
    ]

    def encode(clip: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for state, _ in states:
            state[...] = 0
        for part in clip:
            frames[...] = part
            before_call()
            call()
            yield latent[0]
            for state, new_state in states:
                state[...] = new_state

    return encode


def encode_start(
    config: Config,
    graph: LoadedGraph,
    clip: np.ndarray,
    blocks: int | None,
    before_call: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Encode the frames that a video begins with.

    Args:
        config: Of the bundle.
        graph: The graph `vae_encoder`.
        clip: uint8 RGB [T, H, W, 3]. Whole blocks of it are used; a shorter clip holds its last
            frame.
        blocks: Blocks of the video; None: no end.
        before_call: Called before each call of the graph; what it raises ends the encoding.

    Returns:
        Clean latents of at most `blocks` blocks, float32 [start blocks, B_f, C, h, w].
    """
    latents = start_blocks(config, len(clip), blocks) * config.block_frames
    first = config.lookahead_frames - config.trimmed_frames  # that the encoder is given
    frames = np.arange(first, first + latents * TEMPORAL_FACTOR)
    clip = clip[np.clip(frames, 0, len(clip) - 1)]
    groups = clip.reshape(latents, TEMPORAL_FACTOR, *clip.shape[1:]).transpose(0, 1, 4, 2, 3)
    encode = bind_encoder(graph, encoder_arrays(config, HostDevice()), before_call)
    encoded = [latent.copy() for latent in encode(group / np.float32(255) for group in groups)]
    return np.stack(encoded).reshape(-1, config.block_frames, *encoded[0].shape)
