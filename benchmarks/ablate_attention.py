"""Measure what fp8 attention costs, end to end, by how it is quantized.

    python -m benchmarks.ablate_attention BUNDLE --calibration FILE [--with QUANTIZED ...]
        [--prompts 16] [--seconds 5]

The attention of BUNDLE, in fp32, is quantized in several ways, and what an engine does to the
softmax is written into the graph, in both conventions of `packforcing.export.attention`. The same
is done with each bundle with fp8 attention that `packforcing quantize` made of it. For each way the
table has the signal-to-noise ratio of the flow, on the same inputs in every step of a rollout; for
what `quantize` does also the PSNR of the videos against those of BUNDLE, mean and lowest over the
prompts, and the share of videos of at least 33 dB. FILE has statistics of other prompts.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import onnx_ir as ir

from packforcing.calibration.activations import ATTENTION_OPERANDS, Statistics, load_statistics
from packforcing.calibration.attention import (
    attention_scales,
    mix_channels,
    quantize_attention,
)
from packforcing.calibration.matmuls import add_initializer, not_none
from packforcing.calibration.output_error import measure_output_losses
from packforcing.calibration.quantizer import DENOISER
from packforcing.calibration.recipes import ATTENTION_RECIPES
from packforcing.config import Config
from packforcing.errors import ConfigError, PackForcingError
from packforcing.evaluation.prompt_sets import draw_prompts
from packforcing.export.attention import Softmax, write_out_attention
from packforcing.export.exporter import save_graph
from packforcing.files import file_record, write_file
from packforcing.prompts import encode_prompt
from packforcing.runtime.backends import open_backend
from packforcing.runtime.bundle import read_manifest, write_manifest
from packforcing.runtime.rollout import Rollout

GOOD = 33  # dB
SCALES = "fixed, per tensor"  # as `quantize` has them
CONVENTIONS: tuple[Softmax | None, ...] = (None, "normalized", "relative")


class Scheme(NamedTuple):
    """How attention is quantized; by default as `packforcing quantize` does."""

    channels: str = "mixed"  # of queries and keys; or as they are
    share: str = "tensor"  # what has a scale of its own: tensor or head
    scale: str = "fixed"  # by statistics, or dynamic: of each call
    softmax: Softmax | None = "normalized"


SCHEMES = [
    *(Scheme(softmax=softmax) for softmax in CONVENTIONS),
    *(Scheme("as they are", softmax=softmax) for softmax in CONVENTIONS),
    Scheme(share="head"),
    Scheme(scale="dynamic"),
    Scheme(share="head", scale="dynamic"),
]


class Cost(msgspec.Struct, frozen=True):
    """What a scheme or a quantized bundle costs.

    Attributes:
        flow: SQNR of the flow in dB, on the same inputs.
        psnr: PSNR of the videos in dB, by prompt; empty where none was rendered.
    """

    channels: str
    scales: str
    softmax: str
    flow: float | None = None
    psnr: list[float] = []

    @property
    def summary(self) -> tuple[float, float, float]:
        """The mean PSNR, the lowest, and the share of videos of at least `GOOD` dB."""
        good = sum(psnr >= GOOD for psnr in self.psnr)
        return float(np.mean(self.psnr)), min(self.psnr), good / len(self.psnr)


def quantize(graph: ir.Graph, scheme: Scheme, statistics: Statistics, config: Config) -> None:
    """Quantize a denoiser's attention by a scheme, in place.

    Args:
        graph: The denoiser, in fp32.
        scheme: How.
        statistics: Of the model.
        config: The model.
    """
    mixed = scheme.channels == "mixed"
    scales = attention_scales(statistics, config, {}, mixed=mixed)
    if mixed:
        mix_channels(graph, config.head_dim)
    if scheme.share == "tensor":
        scales = [scale.max(-1) for scale in scales]
    quantize_attention(graph, scales, "fp8")
    if scheme.scale == "dynamic":
        make_dynamic(graph, [0, 1, 2, 3] if scheme.share == "tensor" else [0, 2, 3])
    write_out_attention(graph, scheme.softmax)


def make_dynamic(graph: ir.Graph, axes: list[int]) -> None:
    """Compute the scales of a graph's quantized attention in each call, over `axes`."""
    over = add_initializer(graph, "dynamic.axes", ir.tensor(np.array(axes, np.int64)))
    high = ATTENTION_RECIPES["fp8"].high
    factor = add_initializer(graph, "dynamic.factor", ir.tensor(np.float32(1 / high).reshape(())))
    names = tuple(f"{operand}." for operand in ATTENTION_OPERANDS)
    for quantize in [node for node in graph if node.op_type == "QuantizeLinear"]:
        (rounded,) = quantize.outputs
        if str(rounded.name).startswith(names):
            exact = not_none(quantize.inputs[0])
            magnitudes = ir.node("Abs", [exact])
            largest = ir.node("ReduceMax", [*magnitudes.outputs, over], {"keepdims": 0})
            scale = ir.node("Mul", [*largest.outputs, factor])
            graph.insert_before(quantize, [magnitudes, largest, scale])
            for node in (quantize, *rounded.consumers()):
                node.replace_input_with(1, scale.outputs[0])


def write_variants(
    folder: Path, bundle: Path, quantized: list[Path], statistics: Statistics
) -> dict[Path, Cost]:
    """Write a bundle for each scheme, and for each quantized bundle by convention of the softmax.

    Args:
        folder: Where to write.
        bundle: A bundle in fp32.
        quantized: Bundles that were made of it, with fp8 attention.
        statistics: Of the model.

    Returns:
        By path, what it is.
    """
    config, variants = read_manifest(bundle).config, {}

    def write(source: Path, model: ir.Model, cost: Cost) -> None:
        path = Path(shutil.copytree(source, folder / str(len(variants))))
        save_graph(model, path / DENOISER)
        manifest = read_manifest(path)
        manifest.files[DENOISER] = file_record(path / DENOISER)
        write_manifest(path, manifest)
        variants[path] = cost

    for scheme in SCHEMES:
        model = ir.load(bundle / DENOISER)
        quantize(model.graph, scheme, statistics, config)
        scales = f"{scheme.scale}, per {scheme.share}"
        write(bundle, model, Cost(scheme.channels, scales, scheme.softmax or "exact"))
    for path in quantized:
        for softmax in CONVENTIONS:
            model = ir.load(path / DENOISER)
            write_out_attention(model.graph, softmax)
            write(path, model, Cost(path.name, SCALES, softmax or "exact"))
    return variants


def render(bundle: Path, prompts: int, seconds: float) -> list[np.ndarray]:
    """Return the frames of a bundle's videos, 0 to 1, by prompt."""
    manifest = read_manifest(bundle)
    config = manifest.config
    blocks = config.blocks(config.frames(seconds))
    backend = open_backend("onnxruntime", bundle, manifest, config, None)
    rollout = Rollout(config, backend)
    videos = []
    for prompt in draw_prompts(config, prompts, seed=0):
        rollout.begin(encode_prompt(prompt.content, config), blocks, prompt.seed)
        frames = []
        for _ in range(blocks):
            rollout.next_block()
            frames.append(rollout.buffers.pixels.host[0].astype(np.float32))
        videos.append(np.concatenate(frames))
    backend.close()
    return videos


def measure(
    bundle: Path, calibration: Path, quantized: list[Path], prompts: int, seconds: float
) -> Iterator[Cost]:
    """Yield what each scheme costs, then each quantized bundle by its convention of the softmax.

    Args:
        bundle: A bundle in fp32.
        calibration: Its statistics.
        quantized: Bundles that were made of it, with fp8 attention.
        prompts: Prompts to render, with what `quantize` does alone.
        seconds: Length of every video.

    Raises:
        ConfigError: The bundle is not in fp32.
    """
    manifest = read_manifest(bundle)
    if {*msgspec.structs.astuple(manifest.config.precision)} != {"fp32", None}:
        raise ConfigError(f"{bundle} is not in fp32; name the one that quantized ones were made of")
    statistics = load_statistics(calibration, manifest)
    with tempfile.TemporaryDirectory() as folder:
        variants = write_variants(Path(folder), bundle, quantized, statistics)
        losses = measure_output_losses(bundle, {str(path): path for path in variants})
        exact = render(bundle, prompts, seconds)
        for path, cost in variants.items():
            own = cost.scales == SCALES and cost.channels != "as they are"
            videos = render(path, prompts, seconds) if own else []
            psnr = [
                -10 * math.log10(np.mean(np.square(video - truth), dtype=np.float64))
                for video, truth in zip(videos, exact)
            ]
            snr = losses[str(path)]["flow"].snr
            yield msgspec.structs.replace(cost, flow=snr, psnr=psnr)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle", type=Path, help="in fp32")
    options.add_argument("--calibration", type=Path, required=True, help="its statistics")
    options.add_argument("--with", type=Path, action="append", default=[], dest="quantized")
    options.add_argument("--prompts", type=int, default=16)
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--json", type=Path, help="also write the results here")
    args = options.parse_args()
    print(f"{args.prompts} prompts of {args.seconds:g} s")
    heads = f"{'flow':>7}{'PSNR':>7}{'lowest':>8}{f'{GOOD} dB':>8}"
    print(f"{'channels':13}{'scales':20}{'softmax':12}{heads}")
    costs = []
    for cost in measure(args.bundle, args.calibration, args.quantized, args.prompts, args.seconds):
        line = f"{cost.channels:13}{cost.scales:20}{cost.softmax:12}{cost.flow:7.1f}"
        if cost.psnr:
            mean, lowest, share = cost.summary
            line += f"{mean:7.1f}{lowest:8.1f}{share:8.0%}"
        print(line, flush=True)
        costs.append(cost)
    if args.json:
        write_file(args.json, msgspec.json.encode(costs))


if __name__ == "__main__":
    try:
        main()
    except PackForcingError as error:
        sys.exit(f"error: {error}")
