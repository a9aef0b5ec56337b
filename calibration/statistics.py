"""What keys and values look like: statistics that the scales of an 8-bit cache come from.

Collected are those that a cache keeps, of the calls at t = 0: commits and mid passes. Keys are
taken before RoPE. For each layer, head and channel there are the largest magnitude and a
histogram of magnitudes with bins of equal ratio, so memory does not grow with the rollouts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from packforcing.errors import CalibrationError, OutputError
from packforcing.prompts import encode
from packforcing.runtime.backend import Bindable, open_backend
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import Manifest, read_manifest
from packforcing.runtime.device import view
from packforcing.runtime.engines import graph_files
from packforcing.runtime.rollout import Rollout
from packforcing.runtime.session import bounded, check_request

OCTAVE, LOWEST, BINS = 8, -10, 160  # bins per factor of two; the first begins at 2^LOWEST
# magnitude in the middle of each bin
MIDDLES = np.float32(2) ** ((np.arange(BINS, dtype=np.float32) + 0.5) / OCTAVE + LOWEST)
SOURCE = "source"  # of the file's metadata

Statistics = dict[str, np.ndarray]  # k.largest, v.largest [L,H,d]; k.counts, v.counts [L,H,d,BINS]


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What statistics are of."""

    model: str
    denoiser: dict[str, str]  # SHA-256 of its files
    prompts: list[str]  # words, or the SHA-256 of an embedding
    seed: int  # of the first prompt; each next one has the next
    blocks: int  # per prompt
    done: int  # prompts that are in the statistics


def calibrate(
    directory: str | Path,
    prompts: Sequence[str | np.ndarray],
    path: str | Path,
    *,
    seconds: float = 5.0,
    seed: int = 0,
    on_block: Callable[[int, int], None] | None = None,
) -> Source:
    """Rolls a bundle out on every prompt and writes the statistics, after each of them.

    prompts: words or embeddings, float [T, text_dim]. A file that holds part of the same
    rollouts is gone on with. `on_block` is told how many blocks are done, and of how many. Raises
    `CalibrationError` for a key or value that is no number or a file of other rollouts, and what
    opening a bundle and reading a prompt raise, or `OutputError`.
    """
    directory, path = Path(directory), Path(path)
    manifest = read_manifest(directory)
    config = manifest.config
    if config.precision.cache != config.precision.compute:
        raise CalibrationError(
            f"the cache of {directory} is {config.precision.cache} already; name the bundle that "
            "it was made of"
        )
    if not prompts:
        raise CalibrationError("no prompts to roll out: name one per line")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
    asked = [check_request(config, prompt, seconds, seed + i) for i, prompt in enumerate(prompts)]
    names = [
        prompt if isinstance(prompt, str) else hashlib.sha256(prompt.tobytes()).hexdigest()
        for prompt in prompts
    ]
    texts = [encode(timeline.switches[0].prompt, config) for timeline in asked]
    blocks = config.blocks(config.frames(seconds))
    source = Source(
        model=config.name,
        denoiser=graph_files(manifest, "denoiser"),
        prompts=names,
        seed=seed,
        blocks=blocks,
        done=0,
    )
    found: Statistics = {}
    if path.exists():
        known, found = read(path)
        if msgspec.structs.replace(known, done=0) != source:
            raise CalibrationError(
                f"{path} holds statistics of another model or other prompts; choose another name"
            )
        source = known
    policy = bounded(config.policy, config.policy, blocks)
    config = msgspec.structs.replace(config, policy=policy)
    backend = open_backend("onnxruntime", directory, manifest, config, None)
    try:
        watched = _Watched(backend.graphs["denoiser"], found)
        backend.graphs["denoiser"] = watched
        rollout = Rollout(config, backend)
        for number in range(source.done, len(prompts)):
            rollout.begin(texts[number], blocks, seed + number)
            for block in range(blocks):
                watched.where = f"block {block} of '{names[number]}'"
                rollout.next_block()
                if on_block:
                    on_block(number * blocks + block + 1, len(prompts) * blocks)
            source = msgspec.structs.replace(source, done=number + 1)
            _write(path, source, found)
    finally:
        backend.close()
    return source


def statistics_for(path: str | Path, manifest: Manifest) -> Statistics:
    """Statistics of a bundle's denoiser, whole; raises `CalibrationError` for others."""
    source, found = read(path)
    if source.denoiser != graph_files(manifest, "denoiser"):
        raise CalibrationError(
            f"{path} holds statistics of another model (a {source.model}) than the bundle's "
            f"{manifest.config.name}; make them with 'packforcing calibrate'"
        )
    if source.done < len(source.prompts):
        raise CalibrationError(
            f"{path} holds {source.done} of {len(source.prompts)} rollouts; run the same "
            "'packforcing calibrate' again to go on"
        )
    return found


def read(path: str | Path) -> tuple[Source, Statistics]:
    """A file of statistics; raises `CalibrationError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            said = (file.metadata() or {}).get(SOURCE, "")
            source = msgspec.json.decode(said, type=Source)
            return source, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, msgspec.DecodeError) as error:
        raise CalibrationError(
            f"cannot read statistics from {path}: {error}; make them with 'packforcing calibrate'"
        ) from error


def add(found: Statistics, kind: str, layer: int, layers: int, tokens: np.ndarray) -> None:
    """Adds tokens [H, n, d] of keys or values ("k" or "v") of a layer.

    Raises `ValueError` for one that is no number.
    """
    heads, _, size = tokens.shape
    magnitude = np.abs(tokens, dtype=np.float32)
    largest = magnitude.max(1)
    if not np.isfinite(largest).all():
        head, channel = np.argwhere(~np.isfinite(largest))[0]
        raise ValueError(f"{kind} of layer {layer}, head {head}, channel {channel}")
    all_largest = found.setdefault(f"{kind}.largest", np.zeros((layers, heads, size), np.float32))
    np.maximum(all_largest[layer], largest, out=all_largest[layer])
    counts = found.setdefault(f"{kind}.counts", np.zeros((layers, heads, size, BINS), np.uint32))
    with np.errstate(divide="ignore"):
        bins = np.clip((np.log2(magnitude) - LOWEST) * OCTAVE, 0, BINS - 1).astype(np.int64)
    bins += np.arange(heads * size).reshape(heads, 1, size) * BINS
    counts[layer] += np.bincount(bins.ravel(), minlength=heads * size * BINS).reshape(
        heads, size, BINS
    ).astype(np.uint32)  # fmt: skip


class _Watched:
    """A denoiser whose new keys and values are added to the statistics at t = 0."""

    def __init__(self, graph: Bindable, found: Statistics) -> None:
        self.graph, self.found, self.where = graph, found, ""
        self.seconds = 0.0

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        call = self.graph.bind(arrays)
        layers = sum(name.startswith("k_new.") for name in arrays)

        def run() -> None:
            call()
            if view(arrays["timestep"])[0] != 0:
                return
            for layer in range(layers):
                for kind in "kv":
                    try:
                        add(self.found, kind, layer, layers, view(arrays[f"{kind}_new.{layer}"])[0])
                    except ValueError as error:
                        raise CalibrationError(
                            f"no number in {self.where}: {error}; the bundle is not sound, try "
                            "'packforcing verify'"
                        ) from error

        return run


def _write(path: Path, source: Source, found: Statistics) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_file(found, partial, {SOURCE: msgspec.json.encode(source).decode()})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
