"""What several test modules share: the tiny model, the command line, frames, damage, the builder.

Test modules import nothing from each other. Heavy packages are imported inside the functions.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import av
import cv2
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result

from packforcing import Config, Policy
from packforcing.app.cli import main
from packforcing.presets import model_config
from tests.golden import cases as golden

PROMPT = "a red star over navy stripes"
SEED = 3

TINY = Config(
    **golden.TINY, sampler="renoise", policy=Policy(sink=1, mid=3, recent=2, mid_span=2.5)
)

WAN = model_config("wan-1.3b")
CONFIGS = {
    "wan": WAN,
    "demo": model_config("demo"),
    "tiny": TINY,
    "low branch": msgspec.structs.replace(TINY, compressor_widths=()),
}

DEEP = msgspec.structs.replace(TINY, name="deep", layers=4, ffn_dim=384)  # two can be quantized
CALIBRATION_PROMPTS = ("a red star", "a blue square over sand")

POLICIES = {
    "packforcing": None,
    "no sink": Policy(sink=0, mid=2, recent=2),
    "no recent": Policy(sink=1, mid=4, recent=0, selection="random"),
    "absolute": Policy(sink=2, mid=2, recent=1, positions="absolute", selection="recency"),
    "sliding window": Policy(sink=0, mid=0, recent=3),
    "sink and window": Policy(sink=1, mid=0, recent=2),
    "full history": Policy(sink=0, mid=0, recent=12),
    "first step": Policy(sink=1, mid=2, recent=1, selection="first-step"),
    "last step": Policy(sink=1, mid=3, recent=2, mid_span=2.5, commit="last-step"),
}
ABLATIONS = {
    "likeness": Policy(sink=1, mid=2, recent=1, selection="likeness"),
    "high branch": Policy(sink=1, mid=3, recent=1, branches="high"),
    "low branch": Policy(sink=1, mid=3, recent=1, branches="low"),
}


def is_prompt_weight(name: str) -> bool:
    """Tell whether a transformer's weight is in the prompt's graph, not the denoiser's."""
    return "text_embedding" in name or any(
        part in name for part in ("cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k")
    )


def make_model(config: Config, weights: Mapping[str, np.ndarray]):
    """Make a model of weights by checkpoint name; a part without any keeps random ones."""
    import torch

    from packforcing.model import random_model

    model = random_model(config)
    for prefix, part in model.parts().items():
        tensors = {
            name.removeprefix(f"{prefix}."): torch.from_numpy(values)
            for name, values in weights.items()
            if name.startswith(f"{prefix}.")
        }
        if tensors:
            part.load_state_dict(tensors)
    return model


def make_tiny_model():
    """Make the golden tiny model: torch's own weights give pictures that are all but black."""
    return make_model(TINY, golden.make_weights(golden.TINY))


# The command line


def run(*args: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def run_without(module: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run a command in a fresh interpreter in which `module` is not installed."""
    code = (
        f"import sys; sys.modules[{module!r}] = None; from packforcing.app.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def run_measured(*args: object) -> tuple[str, float, int]:
    """Run a command in a process of its own; return its output, seconds and peak resident bytes."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "packforcing.app.cli", *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return printed, time.perf_counter() - began, usage.ru_maxrss * 1024


def assert_one_line(code: int, stdout: str, stderr: str, message: str) -> None:
    """Assert that a command failed with exit code 2 and one line that matches `message`."""
    assert code == 2, stderr
    assert stdout == ""
    assert stderr.count("\n") == 1 and stderr.startswith("error: ")
    assert re.search(message, stderr), stderr


def assert_refused(result: Result, *parts: str) -> None:
    """Assert that a command failed with one line that holds each of `parts`."""
    assert_one_line(result.exit_code, result.stdout, result.stderr, "")
    assert all(part in result.stderr for part in parts), result.stderr


# Frames


def umt5_bundle(folder: Path) -> Path:
    """Copy the demo bundle as one of a model that reads UMT5's embeddings."""
    import shutil

    import msgspec

    from packforcing.runtime import demo_bundle
    from packforcing.runtime.bundle import read_manifest, write_manifest

    bundle = folder / "bundle"
    shutil.copytree(demo_bundle(), bundle)
    manifest = read_manifest(bundle)
    config = msgspec.structs.replace(manifest.config, text_encoder="umt5-xxl")
    write_manifest(bundle, msgspec.structs.replace(manifest, config=config))
    return bundle


def frames_of(path: Path) -> np.ndarray:
    """Read a video, or a folder of pictures, uint8 RGB [T, H, W, 3]."""
    if path.is_dir():
        return np.stack([cv2.imread(str(file))[..., ::-1] for file in sorted(path.iterdir())])
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def assert_follows_reference(rollout, expected, latents, frames, query) -> None:
    """Compare block after block, each from the history that the reference had.

    latents, frames, query: the largest errors allowed; that of latents is relative.
    """
    for block in expected:
        rollout.place()
        rollout.denoise()
        rollout.buffers.latents_as_patches[...] = rollout.buffers.tokens_as_latents
        clean = block.latents.numpy()
        error = np.abs(rollout.buffers.latents.host[0] - clean).max()
        assert error <= latents * np.abs(clean).max()
        # a block that is given has no last step to commit, so that block is generated once more
        generates = rollout.config.policy.commit == "last-step"
        rollout.next_block(clean=None if generates else clean)
        assert [rollout.scene + mid for mid in rollout.read] == block.read
        pixels = rollout.buffers.pixels.host[0]
        np.testing.assert_allclose(pixels, block.frames.numpy(), atol=frames)
        np.testing.assert_allclose(rollout.buffers.denoiser["q_pool"].host, block.query, atol=query)


# Renders that are interrupted: a block lasts 1.5 s, so 11 blocks, two between snapshots

RENDER_SECONDS, RENDER_INTERVAL, RENDER_SEED = 15, 3.0, 5


def render(session, path, **changes):
    """Render the example video, with some settings changed."""
    settings = {
        "prompt": PROMPT,
        "seconds": RENDER_SECONDS,
        "seed": RENDER_SEED,
        "checkpoint_seconds": RENDER_INTERVAL,
    }
    return session.render(path=path, **{**settings, **changes})


def stop_after(session, *blocks):
    """Return an `on_block` that stops the session after each of these blocks."""
    return lambda info: session.stop() if info.index + 1 in blocks else None


# Damage to one file; `other` is a second one of the same folder


def flip(path: Path, other: Path, where: random.Random) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[where.randrange(len(data))] ^= 1 << where.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, other: Path, where: random.Random) -> None:
    os.truncate(path, where.randrange(path.stat().st_size))


def swap(path: Path, other: Path, where: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(data)


def remove(path: Path, other: Path, where: random.Random) -> None:
    path.unlink()


def link(path: Path, other: Path, where: random.Random) -> None:
    """Put a link to the right bytes, which lie elsewhere, in the file's place."""
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES = flip, truncate, swap, remove, link


# What TensorRT-RTX's builder says of a graph, and how close the estimates come


def builder_job(
    config: Config, path: Path, graph: str, *others: Config, targets: tuple[str, ...] = ()
):
    """Describe the build of one engine, with profiles for `others` that it could serve too."""
    from packforcing.export.builder import BuildJob
    from packforcing.export.engines import RTX_TARGETS
    from packforcing.runtime.bundle import contract
    from packforcing.runtime.engine_records import shapes

    return BuildJob(
        backend="tensorrt-rtx",
        graph=str(path),
        engine=str(path.with_suffix(".engine")),
        targets=targets or RTX_TARGETS,
        calls=tuple(shapes(config, graph)) * (1 + len(others)),
        profiles=tuple(
            {
                tensor.name: tuple(axes.get(n, n) for n in tensor.shape)
                for tensor in contract(config)[graph].inputs
                if any(isinstance(n, str) for n in tensor.shape)
            }
            for other in (config, *others)
            for axes in shapes(other, graph).values()
        ),
        attentions=config.layers if graph == "denoiser" else 0,
        length="input" if graph == "denoiser" else None,
        softmax=None,
        flags=(),
        kernel_types=(),
    )


def builder_figures(
    config: Config, folder: Path, graph: str, *others: Config, targets: tuple[str, ...] = ()
) -> list[dict[str, int]]:
    """Build one engine; return the builder's weight and scratch bytes by name, per config."""
    pytest.importorskip("tensorrt_rtx")
    from packforcing.export.builder import build_engine
    from packforcing.export.exporter import save_graph
    from packforcing.export.graphs import export_graph
    from packforcing.model import random_weights
    from packforcing.runtime.bundle import graph_file
    from packforcing.runtime.engine_records import shapes

    path = folder / graph_file(graph)
    save_graph(export_graph(config, random_weights(config), graph), path)
    built = build_engine(builder_job(config, path, graph, *others, targets=targets))
    calls = [f"scratch.{call}" for call in shapes(config, graph)]
    scratch = iter(built.scratch)
    return [
        {f"weights.{graph}": built.weights, **{call: next(scratch) for call in calls}}
        for _ in (config, *others)
    ]


def is_close_estimate(name: str, estimate: float, built: float, below: int) -> bool:
    """Print one line of estimate against builder; tell whether it is as close as promised.

    Weights within 1%, scratch within 25% and short by no more than `below` bytes.
    """
    error = estimate / built - 1
    print(f"{name:<44} {built:>13,} {estimate:>13,} {error:>+7.1%}")
    return abs(error) <= (0.01 if ".weights." in name else 0.25) and built - estimate <= below


# Quantized bundles


def quantized_matrices(bundle: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Dequantize the layers' matrices of a bundle by the definition of each format.

    Returns:
        By name, the matrix and the scale of each weight, float32 [inputs, outputs]. Halves of
        feed-forward layers are joined.
    """
    import ml_dtypes
    import onnx_ir as ir

    from packforcing.calibration.weights import input_name

    graph = ir.load(bundle / "denoiser.onnx").graph
    parts: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for node in graph:
        is_matrix = node.op_type in ("DequantizeLinear", "Nvfp4Dequantize")
        if not is_matrix or node.inputs[0].const_value is None:
            continue
        values, *scales = (value.const_value.numpy() for value in node.inputs)
        if node.op_type == "Nvfp4Dequantize":
            values = values.astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
        values, scale, *unit = (array.astype(np.float32) for array in (values, *scales))
        if unit:
            scale = np.repeat(scale * unit[0], 16, axis=0)
        elif node.attributes["axis"].as_int() == 0:
            scale = np.repeat(scale, node.attributes["block_size"].as_int(), axis=0)
        name, _, half = str(node.inputs[0].name).rpartition(".")[0].partition(".half")
        factors = graph.initializers.get(f"{input_name(name)}.factors")
        if factors is not None:
            scale = scale * factors.const_value.numpy().astype(np.float32)[:, None]
        parts.setdefault(name, {})[half] = values * scale, scale + 0 * values
    matrices = {}
    for name, halves in parts.items():
        axis = 1 if "ffn.0" in name else 0
        pairs = [halves[half] for half in sorted(halves)]
        matrix, scale = (np.concatenate(arrays, axis) for arrays in zip(*pairs))
        matrices[name] = matrix, scale
    return matrices


def random_statistics(config: Config) -> dict[str, np.ndarray]:
    """Return random activation statistics of a model."""
    from packforcing.calibration.activations import array_specs

    rng = np.random.default_rng(0)
    statistics = {
        name: rng.uniform(1, 4, shape).astype(dtype)
        for name, (shape, dtype) in array_specs(config).items()
    }
    for name, array in statistics.items():
        if name.endswith(".moments"):  # positive semidefinite, as moments of any inputs are
            statistics[name] = array @ array.swapaxes(-1, -2)
    return statistics


def invent_statistics(bundle: Path, path: Path) -> Path:
    """Write random statistics of a model that is too large to be rolled out in a test."""
    from safetensors.numpy import save_file

    from packforcing.calibration.activations import (
        SOURCE_KEY,
        StatisticsSource,
        call_names,
    )
    from packforcing.runtime.bundle import read_manifest
    from packforcing.runtime.engine_records import graph_files

    manifest = read_manifest(bundle)
    source = StatisticsSource(
        model=manifest.config.name,
        denoiser=graph_files(manifest, "denoiser"),
        prompts=["none"],
        seed=0,
        blocks=1,
        calls=call_names(manifest.config),
        done=1,
    )
    statistics = random_statistics(manifest.config)
    save_file(statistics, path, {SOURCE_KEY: msgspec.json.encode(source).decode()})
    return path
