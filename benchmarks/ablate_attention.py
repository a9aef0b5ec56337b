"""Measure what fp8 attention costs, end to end, by how it is quantized.

    python -m benchmarks.ablate_attention BUNDLE --calibration FILE [--with QUANTIZED ...]
        [--prompts 16] [--seconds 5]

The attention of BUNDLE, in fp32, is quantized in several ways, and what an engine does to the
softmax is written into the graph, in both conventions of `packforcing.export.attention`. The same
is done with each bundle with fp8 attention that `packforcing quantize` made of it. Parts of it are
rounded alone: an operand, the softmax, a layer. As a yardstick, what attention returns is made
wrong by a share of itself, otherwise exact. For each way the table has the signal-to-noise ratio of
the flow, on the same inputs in every step of a rollout; for what `quantize` does and the yardstick
also the PSNR of the videos against those of BUNDLE, mean and lowest over the prompts, the share of
videos of at least 33 dB, and the mean of the first and of the last block. FILE has statistics of
other prompts.
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
from packforcing.calibration.matmuls import add_initializer, cast_source, not_none
from packforcing.calibration.output_error import measure_output_losses
from packforcing.calibration.quantizer import DENOISER
from packforcing.calibration.recipes import ATTENTION_RECIPES
from packforcing.config import Config
from packforcing.errors import ConfigError, PackForcingError
from packforcing.evaluation.prompt_sets import draw_prompts
from packforcing.export.attention import Softmax, context_attentions, write_out_attention
from packforcing.export.exporter import save_graph
from packforcing.files import file_record, write_file
from packforcing.prompts import encode_prompt
from packforcing.runtime.backends import open_backend
from packforcing.runtime.bundle import read_manifest, write_manifest
from packforcing.runtime.rollout import Rollout

GOOD = 33  # dB
FP8 = ir.DataType.FLOAT8E4M3FN
WHOLE = ("all", "q, k, v")  # of `Cost.rounded`: what a bundle rounds
SCALES = "fixed, per tensor"  # as `quantize` has them
CONVENTIONS: tuple[Softmax | None, ...] = (None, "normalized", "relative")


class Scheme(NamedTuple):
    """How attention is quantized; by default as `packforcing quantize` does."""

    channels: str = "mixed"  # of queries and keys; or as they are
    share: str = "tensor"  # what has a scale of its own: tensor or head
    scale: str = "fixed"  # by statistics, or dynamic: of each call
    softmax: Softmax | None = "normalized"
    operands: tuple[str, ...] = ATTENTION_OPERANDS  # that are rounded
    layer: int | None = None  # the only one that is quantized
    centered: bool = False  # keys less their mean, which no softmax sees
    parts: int = 1  # fp8 values whose sum stands for a key
    noise: float = 0.0  # of what attention returns, as a share of it, in place of all the above

    @property
    def rounded(self) -> str:
        """What is rounded, in words."""
        if self.noise:
            return f"none; off by {self.noise:g}"
        names = [operand.removeprefix("attention.") for operand in self.operands]
        names += ["softmax"] if self.softmax else []
        what = "all" if len(names) == 1 + len(ATTENTION_OPERANDS) else ", ".join(names)
        what += f" of layer {self.layer}" if self.layer is not None else ""
        what += ", keys centered" if self.centered else ""
        return what + (f", keys in {self.parts} parts" if self.parts > 1 else "")


def schemes(layers: int) -> list[Scheme]:
    """Return what is compared, for a model of so many layers."""
    return [
        *(Scheme(softmax=softmax) for softmax in CONVENTIONS),
        Scheme("as they are"),
        Scheme(share="head"),
        Scheme(scale="dynamic"),
        Scheme(share="head", scale="dynamic"),
        *(Scheme(softmax=None, operands=(operand,)) for operand in ATTENTION_OPERANDS),
        *(Scheme(softmax=softmax, operands=()) for softmax in CONVENTIONS if softmax),
        *(Scheme(layer=layer) for layer in range(layers)),
        Scheme(centered=True),
        Scheme(parts=2),
        *(Scheme(noise=share) for share in (1e-2, 1e-3)),
    ]


class Cost(msgspec.Struct, frozen=True):
    """What a scheme or a quantized bundle costs.

    Attributes:
        flow: SQNR of the flow in dB, on the same inputs.
        psnr: PSNR of the videos in dB, by prompt; empty where none was rendered.
        blocks: PSNR in dB by block, the mean over the prompts.
    """

    channels: str
    scales: str
    softmax: str
    rounded: str = "all"
    flow: float | None = None
    psnr: list[float] = []
    blocks: list[float] = []

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
    if scheme.noise:
        add_noise(graph, scheme.noise)
        return
    if scheme.centered:
        center_keys(graph)
    mixed = scheme.channels == "mixed"
    scales = attention_scales(statistics, config, {}, mixed=mixed)
    if mixed:
        mix_channels(graph, config.head_dim)
    if scheme.share == "tensor":
        scales = [scale.max(-1) for scale in scales]
    quantize_attention(graph, scales, "fp8")
    if scheme.scale == "dynamic":
        make_dynamic(graph, [0, 1, 2, 3] if scheme.share == "tensor" else [0, 2, 3])
    for layer, attention in enumerate(context_attentions(graph)):
        alone = scheme.layer in (None, layer)
        for index, operand in enumerate(ATTENTION_OPERANDS):
            read = not_none(attention.inputs[index])
            quantize = not_none(not_none(read.producer()).inputs[0]).producer()
            exact, scale = (not_none(value) for value in not_none(quantize).inputs)
            if not alone or operand not in scheme.operands:
                attention.replace_input_with(index, exact)
            elif operand == "attention.k" and scheme.parts > 1:
                attention.replace_input_with(
                    index, in_two_parts(graph, attention, exact, read, scale)
                )
    write_out_attention(graph, scheme.softmax, None if scheme.layer is None else [scheme.layer])


def in_two_parts(
    graph: ir.Graph, before: ir.Node, exact: ir.Value, read: ir.Value, scale: ir.Value
) -> ir.Value:
    """Add what rounding took, rounded by a sixteenth of the scale; return the sum."""
    name = f"{exact.name}.rest"
    factor = add_initializer(graph, f"{name}.factor", ir.tensor(np.float32(1 / 16).reshape(())))
    rest = ir.node("Sub", [exact, read])
    finer = ir.node("Mul", [scale, factor])
    quantize = ir.node(
        "QuantizeLinear", [*rest.outputs, *finer.outputs], {"output_dtype": int(FP8)}
    )
    dequantize = ir.node("DequantizeLinear", [*quantize.outputs, *finer.outputs])
    total = ir.node("Add", [read, *dequantize.outputs])
    graph.insert_before(before, [rest, finer, quantize, dequantize, total])
    total.outputs[0].shape, total.outputs[0].dtype = exact.shape, exact.dtype
    return total.outputs[0]


def center_keys(graph: ir.Graph) -> None:
    """Subtract from the keys of every head their mean over all valid ones."""
    zero, tokens = (
        add_initializer(graph, f"center.{name}", ir.tensor(np.array([value], np.int64)))
        for name, value in (("zero", 0), ("axis", 2))
    )
    for attention in context_attentions(graph):
        keys = cast_source(not_none(attention.inputs[1]))
        valid = ir.node("Slice", [keys, zero, not_none(attention.inputs[6]), tokens])
        mean = ir.node("ReduceMean", [*valid.outputs, tokens], {"keepdims": 1})
        center = ir.node("Sub", [keys, *mean.outputs])
        graph.insert_before(attention, [valid, mean, center])
        center.outputs[0].shape, center.outputs[0].dtype = keys.shape, keys.dtype
        attention.replace_input_with(1, center.outputs[0])


def add_noise(graph: ir.Graph, share: float) -> None:
    """Multiply what attention returns by 1 + `share` times noise, a fixed function of the value."""
    fast, amplitude = (
        add_initializer(graph, f"noise.{name}", ir.tensor(np.float32(value).reshape(())))
        for name, value in (("fast", 98765.4), ("amplitude", share * math.sqrt(2)))
    )
    for attention in context_attentions(graph):
        (exact,) = attention.outputs
        readers = list(exact.uses())
        scaled = ir.node("Mul", [exact, fast])
        wave = ir.node("Sin", scaled.outputs)
        factor = ir.node("Mul", [*wave.outputs, amplitude])
        error = ir.node("Mul", [exact, *factor.outputs])
        total = ir.node("Add", [exact, *error.outputs])
        for node, index in readers:
            node.replace_input_with(index, total.outputs[0])
        graph.insert_after(attention, [scaled, wave, factor, error, total])
        total.outputs[0].shape, total.outputs[0].dtype = exact.shape, exact.dtype


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

    for scheme in schemes(config.layers):
        model = ir.load(bundle / DENOISER)
        quantize(model.graph, scheme, statistics, config)
        words = ("-",) * 3
        if not scheme.noise:
            scales = f"{scheme.scale}, per {scheme.share}"
            words = (scheme.channels, scales, scheme.softmax or "exact")
        write(bundle, model, Cost(*words, rounded=scheme.rounded))
    for path in quantized:
        for softmax in CONVENTIONS:
            model = ir.load(path / DENOISER)
            write_out_attention(model.graph, softmax)
            write(path, model, Cost(path.name, SCALES, softmax or "exact"))
    return variants


def render(bundle: Path, prompts: int, seconds: float) -> list[np.ndarray]:
    """Return the blocks of frames of a bundle's videos, 0 to 1, by prompt."""
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
        videos.append(np.stack(frames))
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
            recipe = cost.rounded in WHOLE and cost.scales == SCALES
            own = (recipe and cost.channels != "as they are") or cost.channels == "-"
            videos = render(path, prompts, seconds) if own else []
            errors = np.array(  # by prompt and block
                [
                    np.square(video - truth, dtype=np.float64).mean(axis=(1, 2, 3, 4))
                    for video, truth in zip(videos, exact)
                ]
            )
            yield msgspec.structs.replace(
                cost,
                flow=losses[str(path)]["flow"].snr,
                psnr=[-10 * math.log10(error) for error in errors.mean(-1)] if own else [],
                blocks=(-10 * np.log10(errors)).mean(0).tolist() if own else [],
            )


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
    heads = f"{'flow':>7}{'PSNR':>7}{'lowest':>8}{f'{GOOD} dB':>8}{'first':>7}{'last':>7}"
    print(f"{'rounded':28}{'channels':13}{'scales':20}{'softmax':12}{heads}")
    costs = []
    for cost in measure(args.bundle, args.calibration, args.quantized, args.prompts, args.seconds):
        line = (
            f"{cost.rounded:28}{cost.channels:13}{cost.scales:20}{cost.softmax:12}{cost.flow:7.1f}"
        )
        if cost.psnr:
            mean, lowest, share = cost.summary
            line += (
                f"{mean:7.1f}{lowest:8.1f}{share:8.0%}{cost.blocks[0]:7.1f}{cost.blocks[-1]:7.1f}"
            )
        print(line, flush=True)
        costs.append(cost)
    if args.json:
        write_file(args.json, msgspec.json.encode(costs))


if __name__ == "__main__":
    try:
        main()
    except PackForcingError as error:
        sys.exit(f"error: {error}")
