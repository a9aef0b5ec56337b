"""Measure what each choice in an 8-bit cache costs, end to end.

    python -m benchmarks.ablate_cache [BUNDLE] [--prompts 4] [--fit 16] [--seconds 5] [--bits 8]

The bundle, of an exact cache, is rolled out through the runtime. After every call at t = 0 the new
keys and values are replaced in place by what a quantized cache would give back, so that slots,
archive and all later blocks have them. Scales are of other prompts than those measured. For each
scheme the table has the signal-to-noise ratio of keys and of values in dB, of all layers and of
the worst one, and the PSNR of the video against the exact one, mean and lowest over the prompts.
A second table has the same for static scales of 1, 2, 4, ... of the prompts to fit with.

Keys that are rounded after RoPE are so once, at the position of their own block, and rotated back
exactly: the best that storing rotated keys could do, as moving them in place would round again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from packforcing.calibration.activations import BIN_MAGNITUDES, BINS, add_cache_tokens
from packforcing.config import Config
from packforcing.errors import ConfigError, PackForcingError
from packforcing.evaluation.prompt_sets import draw_prompts
from packforcing.files import write_file
from packforcing.prompts import encode_prompt
from packforcing.runtime import demo_bundle
from packforcing.runtime.backends import LoadedGraph, open_backend
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import read_manifest
from packforcing.runtime.device import view
from packforcing.runtime.rollout import Rollout

PERCENTILES = {"99.9%": 0.999, "99.99%": 0.9999}
SHARES = np.arange(20, 0, -1) / 20  # of the largest magnitude, tried for the least squares


class Scheme(NamedTuple):
    """How a cache is quantized; by default as `packforcing quantize` does."""

    keys: str = "before RoPE"
    share_k: str = "pair"  # what has a scale of its own: channel, pair, head, layer, token
    share_v: str = "channel"
    scale: str = "static"  # or per block, or per token
    range: str = "least squares"  # or absmax, or a percentile


SCHEMES = [
    Scheme(),
    Scheme(keys="after RoPE"),
    Scheme(keys="after RoPE", share_k="channel"),
    Scheme(share_k="channel"),
    Scheme(share_k="head", share_v="head"),
    Scheme(share_k="layer", share_v="layer"),
    Scheme(scale="per block", range="absmax"),
    Scheme(share_k="token", share_v="token", scale="per token", range="absmax"),
    Scheme(range="absmax"),
    *(Scheme(range=name) for name in PERCENTILES),
]


class Cost(msgspec.Struct, frozen=True):
    """What a scheme costs.

    Attributes:
        db: Signal-to-noise ratio of keys over all layers and in the worst one, then of values.
        psnr: PSNR of the videos in dB, mean and lowest over the prompts.
        prompts: Prompts that the static scales are fitted to.
    """

    scheme: Scheme
    db: list[float]
    psnr: list[float]
    prompts: int


def shared(array: np.ndarray, share: str, merge: Callable[..., np.ndarray]) -> np.ndarray:
    """Merge channels [..., H, d] that share a scale, and spread the result out again."""
    size = array.shape[-1]
    axes = {"channel": 1, "pair": 2, "head": size}
    if share == "layer":
        return np.broadcast_to(merge(array, (-2, -1), keepdims=True), array.shape)
    parts = array.reshape(*array.shape[:-1], size // axes[share], axes[share])
    return np.broadcast_to(merge(parts, -1, keepdims=True), parts.shape).reshape(array.shape)


def ends(largest: np.ndarray, counts: np.ndarray, share: str, how: str, levels: int) -> np.ndarray:
    """Return the end of the range [L, H, d] by statistics of magnitudes.

    Args:
        largest: Largest magnitudes [L, H, d].
        counts: Histograms of magnitudes [L, H, d, BINS].
        share: What has a scale of its own.
        how: The `range` of a scheme.
        levels: The largest integer.
    """
    largest = shared(largest, share, np.max)
    counts = np.moveaxis(shared(np.moveaxis(counts, -1, 0), share, np.sum), 0, -1)
    if how == "absmax":
        return largest
    if how in PERCENTILES:
        below = counts.cumsum(-1) < PERCENTILES[how] * counts.sum(-1, keepdims=True)
        return np.minimum(largest, BIN_MAGNITUDES[below.sum(-1).clip(max=BINS - 1)])
    least, best = np.full(largest.shape, np.inf), largest
    for portion in SHARES:
        end = (largest * portion)[..., None]
        beyond = np.where(
            end < BIN_MAGNITUDES, (BIN_MAGNITUDES - end) ** 2, (end / levels) ** 2 / 12
        )
        error = (beyond * counts).sum(-1)
        best = np.where(error < least, end[..., 0], best)
        least = np.minimum(least, error)
    return best


def rotate(keys: np.ndarray, arrays: Arrays, back: bool = False) -> np.ndarray:
    """Rotate keys [H, n, d] by the call's own tables [n, d / 2], or back."""
    cos, sin = (view(arrays[f"rope_{part}"]).astype(np.float32) for part in ("cos", "sin"))
    sin = -sin if back else sin
    a, b = keys[..., ::2], keys[..., 1::2]
    return np.stack((a * cos - b * sin, a * sin + b * cos), -1).reshape(keys.shape)


class ChangedDenoiser:
    """A denoiser whose new keys and values go through `change(kind, layer, tokens, arrays)` at
    t = 0: tokens are [H, n, d] in fp32, and so is what it returns."""

    def __init__(self, graph: LoadedGraph, layers: int) -> None:
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


class Statistics:
    """Statistics of magnitudes: keys before and after RoPE, and values."""

    def __init__(self, config: Config) -> None:
        channels = config.layers, config.heads, config.head_dim
        self.arrays = {}
        for kind in ("before RoPE", "after RoPE", "v"):
            self.arrays[f"{kind}.largest"] = np.zeros(channels, np.float32)
            self.arrays[f"{kind}.counts"] = np.zeros((*channels, BINS), np.uint32)

    def __call__(self, kind: str, layer: int, tokens: np.ndarray, arrays: Arrays) -> np.ndarray:
        if kind == "v":
            add_cache_tokens(self.arrays, "v", layer, tokens)
        else:
            add_cache_tokens(self.arrays, "before RoPE", layer, tokens)
            add_cache_tokens(self.arrays, "after RoPE", layer, rotate(tokens, arrays))
        return tokens


class Rounding:
    """A scheme that rounds to integers up to `levels`, and what it leaves of the signal."""

    def __init__(
        self, scheme: Scheme, statistics: dict[str, np.ndarray], layers: int, levels: int
    ) -> None:
        self.scheme, self.levels = scheme, levels
        self.signal, self.noise = np.zeros((2, layers)), np.zeros((2, layers))
        self.ends = {}
        if scheme.scale == "static":
            for kind, name, share in (
                ("k", scheme.keys, scheme.share_k),
                ("v", "v", scheme.share_v),
            ):
                largest, counts = (statistics[f"{name}.{part}"] for part in ("largest", "counts"))
                self.ends[kind] = ends(largest, counts, share, scheme.range, levels)

    def __call__(self, kind: str, layer: int, tokens: np.ndarray, arrays: Arrays) -> np.ndarray:
        scheme, levels = self.scheme, self.levels
        rotated = kind == "k" and scheme.keys == "after RoPE"
        exact = rotate(tokens, arrays) if rotated else tokens
        if scheme.scale == "static":
            end = self.ends[kind][layer][:, None]
        elif scheme.scale == "per token":
            end = np.abs(exact).max(-1, keepdims=True)
        else:
            share = scheme.share_k if kind == "k" else scheme.share_v
            end = shared(np.abs(exact).max(1), share, np.max)[:, None]
        scale = np.maximum(end / levels, np.finfo(np.float32).tiny)
        rounded = np.clip(np.rint(exact / scale), -levels, levels) * scale
        self.signal["kv".index(kind), layer] += np.square(exact, dtype=np.float64).sum()
        self.noise["kv".index(kind), layer] += np.square(rounded - exact, dtype=np.float64).sum()
        return rotate(rounded, arrays, back=True) if rotated else rounded

    def ratios(self) -> list[float]:
        """Return dB of keys over all layers and of the worst layer, then of values."""
        both = zip(self.signal, self.noise)
        return [
            10 * math.log10(ratio)
            for signal, noise in both
            for ratio in (signal.sum() / noise.sum(), (signal / noise).min())
        ]


def measure_schemes(
    bundle: Path, prompts: int = 4, fit: int = 16, seconds: float = 5.0, bits: int = 8
) -> Iterator[Cost]:
    """Yield what each scheme costs, then the first one with scales of fewer prompts.

    Args:
        bundle: A bundle with an exact cache.
        prompts: Prompts to measure with.
        fit: Other prompts, for static scales.
        seconds: Length of every video.
        bits: Bits of an entry of the cache.

    Raises:
        ConfigError: The bundle's cache is quantized.
    """
    manifest = read_manifest(bundle)
    config = manifest.config
    if config.precision.cache != config.precision.compute:
        raise ConfigError(f"{bundle} has a quantized cache; name the one that it was made from")
    drawn = draw_prompts(config, prompts + fit, seed=0)
    blocks = config.blocks(config.frames(seconds))
    backend = open_backend("onnxruntime", bundle, manifest, config, None)
    denoiser = ChangedDenoiser(backend.graphs["denoiser"], config.layers)
    backend.graphs["denoiser"] = denoiser
    rollout = Rollout(config, backend)

    def video(number: int) -> np.ndarray:
        rollout.begin(encode_prompt(drawn[number].content, config), blocks, drawn[number].seed)
        frames = []
        for _ in range(blocks):
            rollout.next_block()
            frames.append(rollout.buffers.pixels.host[0].astype(np.float32))
        return np.concatenate(frames)

    measured = range(prompts)
    exact = [video(number) for number in measured]
    denoiser.change = statistics = Statistics(config)
    fitted: dict[int, dict[str, np.ndarray]] = {}  # statistics, by the number of prompts
    for count in range(1, fit + 1):
        video(prompts + count - 1)
        if count & (count - 1) == 0 or count == fit:
            fitted[count] = {name: array.copy() for name, array in statistics.arrays.items()}

    def cost(scheme: Scheme, count: int) -> Cost:
        denoiser.change = change = Rounding(
            scheme, fitted[count], config.layers, 2 ** (bits - 1) - 1
        )
        errors = [np.mean(np.square(video(n) - exact[n]), dtype=np.float64) for n in measured]
        psnr = [-10 * math.log10(error) for error in errors]
        return Cost(scheme, change.ratios(), [float(np.mean(psnr)), min(psnr)], count)

    for scheme in SCHEMES:
        yield cost(scheme, fit)
    for count in fitted:
        yield cost(SCHEMES[0], count)
    backend.close()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle", type=Path, nargs="?", default=demo_bundle())
    options.add_argument("--prompts", type=int, default=4, help="to measure with")
    options.add_argument("--fit", type=int, default=16, help="other prompts, for static scales")
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--bits", type=int, default=8)
    options.add_argument("--json", type=Path, help="also write the results here")
    args = options.parse_args()
    print(
        f"{args.bits} bits, {args.prompts} prompts of {args.seconds:g} s\n"
        f"{'keys':12}{'scale per':18}{'scales':11}{'range':15}{'prompts':>7}"
        f"{'K dB':>7}{'worst':>7}{'V dB':>7}{'worst':>7}{'PSNR':>7}{'lowest':>7}"
    )
    costs = []
    for cost in measure_schemes(args.bundle, args.prompts, args.fit, args.seconds, args.bits):
        scheme = cost.scheme
        cells = "".join(f"{value:7.1f}" for value in (*cost.db, *cost.psnr))
        share = f"{scheme.share_k}, {scheme.share_v}"
        print(
            f"{scheme.keys:12}{share:18}{scheme.scale:11}{scheme.range:15}{cost.prompts:7}{cells}",
            flush=True,
        )
        costs.append({**msgspec.to_builtins(cost), "scheme": scheme._asdict()})
    if args.json:
        write_file(args.json, msgspec.json.encode(costs))


if __name__ == "__main__":
    try:
        main()
    except PackForcingError as error:
        sys.exit(f"error: {error}")
