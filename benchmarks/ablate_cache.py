"""What each choice in an 8-bit cache costs, end to end: a table.

    python -m benchmarks.ablate_cache [BUNDLE] [--prompts 4] [--fit 16] [--seconds 5] [--bits 8]

The bundle, of an exact cache, is rolled out through the runtime. After every call at t = 0 the new
keys and values are replaced in place by what a quantised cache would give back, so that slots,
archive and all later blocks have them. Scales are of other prompts than those measured. For each
way of quantising there is the signal-to-noise ratio of keys and of values in dB, of all layers and
of the worst one, and the PSNR of the video against the exact one, mean and least over the prompts.
A second table has the same for static scales of 1, 2, 4, ... of the prompts to fit with.

Keys that are rounded after RoPE are so once, at the position of their own block, and turned back
exactly: the best that storing rotated keys could do, as moving them in place would round again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from packforcing.calibration.activations import BINS, MIDDLES, add
from packforcing.config import Config
from packforcing.errors import ConfigError, PackForcingError
from packforcing.evaluation.prompt_sets import draw_prompts
from packforcing.prompts import encode_prompt
from packforcing.runtime import demo_bundle
from packforcing.runtime.backends import Bindable, open_backend
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.device import view
from packforcing.runtime.rollout import Rollout

PERCENTILES = {"99.9%": 0.999, "99.99%": 0.9999}
SHARES = np.arange(20, 0, -1) / 20  # of the largest magnitude, tried for the least squares


class Way(NamedTuple):
    """How a cache is quantised; by default as `packforcing quantize` does."""

    keys: str = "before RoPE"
    share_k: str = "pair"  # what has a scale of its own: channel, pair, head, layer
    share_v: str = "channel"
    scale: str = "static"  # or of each block, or of each token
    range: str = "least squares"  # or absmax, or a percentile


WAYS = [
    Way(),
    Way(keys="after RoPE"),
    Way(keys="after RoPE", share_k="channel"),
    Way(share_k="channel"),
    Way(share_k="head", share_v="head"),
    Way(share_k="layer", share_v="layer"),
    Way(scale="block", range="absmax"),
    Way(scale="token", range="absmax"),
    Way(range="absmax"),
    *(Way(range=name) for name in PERCENTILES),
]


def shared(array: np.ndarray, share: str, merge: Callable[..., np.ndarray]) -> np.ndarray:
    """Channels [..., H, d] merged to those that share a scale, and spread out again."""
    size = array.shape[-1]
    axes = {"channel": 1, "pair": 2, "head": size}
    if share == "layer":
        return np.broadcast_to(merge(array, (-2, -1), keepdims=True), array.shape)
    parts = array.reshape(*array.shape[:-1], size // axes[share], axes[share])
    return np.broadcast_to(merge(parts, -1, keepdims=True), parts.shape).reshape(array.shape)


def ends(largest: np.ndarray, counts: np.ndarray, share: str, how: str, levels: int) -> np.ndarray:
    """The end of the range [L, H, d] by statistics of magnitudes, [L, H, d] and [L, H, d, BINS]."""
    largest = shared(largest, share, np.max)
    counts = np.moveaxis(shared(np.moveaxis(counts, -1, 0), share, np.sum), 0, -1)
    if how == "absmax":
        return largest
    if how in PERCENTILES:
        below = counts.cumsum(-1) < PERCENTILES[how] * counts.sum(-1, keepdims=True)
        return np.minimum(largest, MIDDLES[below.sum(-1).clip(max=BINS - 1)])
    best, chosen = np.full(largest.shape, np.inf), largest
    for portion in SHARES:
        end = (largest * portion)[..., None]
        beyond = np.where(end < MIDDLES, (MIDDLES - end) ** 2, (end / levels) ** 2 / 12)
        error = (beyond * counts).sum(-1)
        chosen = np.where(error < best, end[..., 0], chosen)
        best = np.minimum(best, error)
    return chosen


def turned(keys: np.ndarray, arrays: Arrays, back: bool = False) -> np.ndarray:
    """Keys [H, n, d] rotated by the call's own tables [n, d / 2], or back."""
    cos, sin = (view(arrays[f"rope_{part}"]).astype(np.float32) for part in ("cos", "sin"))
    sin = -sin if back else sin
    a, b = keys[..., ::2], keys[..., 1::2]
    return np.stack((a * cos - b * sin, a * sin + b * cos), -1).reshape(keys.shape)


class Changed:
    """A denoiser whose new keys and values go through `change(kind, layer, tokens, arrays)` at
    t = 0: tokens are [H, n, d] in fp32, and so is what it returns."""

    def __init__(self, graph: Bindable, layers: int) -> None:
        self.graph, self.layers, self.seconds = graph, layers, 0.0
        self.change: Callable[[str, int, np.ndarray, Arrays], np.ndarray] = lambda k, n, x, a: x

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        call = self.graph.bind(arrays)

        def run() -> None:
            call()
            if view(arrays["timestep"])[0] == 0:
                for layer in range(self.layers):
                    for kind in "kv":
                        tokens = view(arrays[f"{kind}_new.{layer}"])
                        exact = tokens[0].astype(np.float32)
                        tokens[0] = self.change(kind, layer, exact, arrays)

        return run


class Collected:
    """Statistics of magnitudes: keys before and after RoPE, and values."""

    def __init__(self, config: Config) -> None:
        channels = config.layers, config.heads, config.head_dim
        self.found = {}
        for kind in ("before RoPE", "after RoPE", "v"):
            self.found[f"{kind}.largest"] = np.zeros(channels, np.float32)
            self.found[f"{kind}.counts"] = np.zeros((*channels, BINS), np.uint32)

    def __call__(self, kind: str, layer: int, tokens: np.ndarray, arrays: Arrays) -> np.ndarray:
        if kind == "v":
            add(self.found, "v", layer, tokens)
        else:
            add(self.found, "before RoPE", layer, tokens)
            add(self.found, "after RoPE", layer, turned(tokens, arrays))
        return tokens


class Rounded:
    """One way of quantising to whole numbers up to `levels`, and what it left of the signal."""

    def __init__(self, way: Way, found: dict[str, np.ndarray], layers: int, levels: int) -> None:
        self.way, self.levels = way, levels
        self.signal, self.noise = np.zeros((2, layers)), np.zeros((2, layers))
        self.ends = {
            kind: ends(found[f"{name}.largest"], found[f"{name}.counts"], share, way.range, levels)
            for kind, name, share in (("k", way.keys, way.share_k), ("v", "v", way.share_v))
        }

    def __call__(self, kind: str, layer: int, tokens: np.ndarray, arrays: Arrays) -> np.ndarray:
        way, levels = self.way, self.levels
        rotated = kind == "k" and way.keys == "after RoPE"
        exact = turned(tokens, arrays) if rotated else tokens
        if way.scale == "static":
            end = self.ends[kind][layer][:, None]
        elif way.scale == "token":
            end = np.abs(exact).max(-1, keepdims=True)
        else:
            share = way.share_k if kind == "k" else way.share_v
            end = shared(np.abs(exact).max(1), share, np.max)[:, None]
        step = np.maximum(end / levels, np.finfo(np.float32).tiny)
        given = np.clip(np.rint(exact / step), -levels, levels) * step
        self.signal["kv".index(kind), layer] += np.square(exact, dtype=np.float64).sum()
        self.noise["kv".index(kind), layer] += np.square(given - exact, dtype=np.float64).sum()
        return turned(given, arrays, back=True) if rotated else given

    def ratios(self) -> list[float]:
        """Of keys and values: dB over all layers, and of the worst layer."""
        both = zip(self.signal, self.noise)
        return [
            10 * math.log10(ratio)
            for signal, noise in both
            for ratio in (signal.sum() / noise.sum(), (signal / noise).min())
        ]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle", type=Path, nargs="?", default=demo_bundle())
    options.add_argument("--prompts", type=int, default=4, help="to measure with")
    options.add_argument("--fit", type=int, default=16, help="other prompts, for static scales")
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--bits", type=int, default=8)
    args = options.parse_args()
    manifest = read_manifest(args.bundle)
    config = manifest.config
    if config.precision.cache != config.precision.compute:
        raise ConfigError(f"{args.bundle} has a quantised cache; name the one that it was made of")
    prompts = draw_prompts(config, args.prompts + args.fit, seed=0)
    blocks = config.blocks(config.frames(args.seconds))
    backend = open_backend("onnxruntime", args.bundle, manifest, config, None)
    denoiser = Changed(backend.graphs["denoiser"], config.layers)
    backend.graphs["denoiser"] = denoiser
    rollout = Rollout(config, backend)

    def video(number: int) -> np.ndarray:
        rollout.begin(encode_prompt(prompts[number].content, config), blocks, prompts[number].seed)
        frames = []
        for _ in range(blocks):
            rollout.next_block()
            frames.append(rollout.buffers.pixels.host[0].astype(np.float32))
        return np.concatenate(frames)

    measured = range(args.prompts)
    wanted = [video(number) for number in measured]
    denoiser.change = collected = Collected(config)
    after: dict[int, dict[str, np.ndarray]] = {}  # statistics, by the number of prompts
    for count in range(1, args.fit + 1):
        video(args.prompts + count - 1)
        if count & (count - 1) == 0 or count == args.fit:
            after[count] = {name: array.copy() for name, array in collected.found.items()}

    def cost(way: Way, found: dict[str, np.ndarray]) -> str:
        """Cells of a row, by rendering all prompts again."""
        denoiser.change = change = Rounded(way, found, config.layers, 2 ** (args.bits - 1) - 1)
        errors = [np.mean(np.square(video(n) - wanted[n]), dtype=np.float64) for n in measured]
        psnr = [-10 * math.log10(error) for error in errors]
        cells = "".join(f"{ratio:{6 + i % 2}.1f}" for i, ratio in enumerate(change.ratios()))
        return f"{cells}{np.mean(psnr):7.1f}{min(psnr):7.1f}"

    heads = f"{'K dB':>6}{'worst':>7}{'V dB':>6}{'worst':>7}{'PSNR':>7}{'least':>7}"
    print(
        f"{config.name}, {args.bits} bits, {args.prompts} prompts of {args.seconds:g} s, static "
        f"scales of {args.fit} others\n"
        f"{'keys':12}{'scale per':18}{'scale':8}{'range':15}{heads}"
    )
    for way in WAYS:
        per = f"{way.share_k}, {way.share_v}" if way.scale != "token" else "token"
        cells = cost(way, collected.found)
        print(f"{way.keys:12}{per:18}{way.scale:8}{way.range:15}{cells}", flush=True)
    print(f"\n{'the first way, with scales of so many prompts':53}{heads}")
    for count, found in after.items():
        print(f"{count:<53}{cost(Way(), found)}", flush=True)
    backend.close()


if __name__ == "__main__":
    try:
        main()
    except PackForcingError as error:
        sys.exit(f"error: {error}")
