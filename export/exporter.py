"""Write a bundle: every graph of the contract, then the manifest."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from packforcing.config import Config
from packforcing.export.graphs import WRAPPERS, export_graph
from packforcing.files import file_record, new_folder, require_disk_space
from packforcing.model import Weights, weight_shapes
from packforcing.origins import Origin
from packforcing.runtime.bundle import (
    DTYPES,
    ENGINE_FOLDER,
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    contract,
    graph_file,
    write_manifest,
)

INLINE_BYTES = 1 << 28  # of weights in the graph's own file, a protobuf: built in memory, < 2 GiB
TOOLS = ("packforcing", "torch", "onnx", "onnxscript")


def export_bundle(
    config: Config,
    weights: Weights,
    directory: str | Path,
    on_graph: Callable[[str, int, int], None] | None = None,
    origins: Sequence[Origin] = (),
) -> Manifest:
    """Export a model into `directory`, replacing a bundle that is there, engines included.

    Graphs are written beside the directory, which changes once all of them are complete.

    Args:
        config: The model.
        weights: Tensors by checkpoint name, as `Model.weights`, `open_weights` and
            `random_weights` return them. Each is read when its graph is written and released
            again, so memory stays small whatever the size of the model.
        directory: The bundle's folder.
        on_graph: Called before each export with the graph's name, its index and their number.
        origins: Of the weights; none where nothing is known of them.

    Returns:
        The manifest that was written.

    Raises:
        ExportError: A graph breaks the contract.
        OutputError: The folder cannot be written, or holds something that is not a bundle.
    """
    item_bytes = np.dtype(DTYPES[config.precision.compute]).itemsize
    needed_bytes = item_bytes * sum(map(math.prod, weight_shapes(config).values()))
    with new_bundle(directory, needed_bytes) as folder:
        for index, name in enumerate(WRAPPERS):
            if on_graph:
                on_graph(name, index, len(WRAPPERS))
            save_graph(export_graph(config, weights, name), folder / graph_file(name))
        tools = {tool: importlib.metadata.version(tool) for tool in TOOLS}
        return write_bundle_manifest(folder, config, tools, origins)


@contextmanager
def new_bundle(directory: str | Path, needed_bytes: int) -> Iterator[Path]:
    """Yield an empty folder for a bundle's files; it takes the place of `directory` at the end.

    Args:
        directory: A new or empty folder, or a bundle to replace.
        needed_bytes: Estimated size of the bundle.

    Raises:
        OutputError: The folder cannot be written, holds something else, or the disk is full.
    """
    with new_folder(directory, is_bundle) as folder:
        remedy = "make room or choose a folder on another disk"
        require_disk_space(folder.parent, needed_bytes, "the bundle", remedy)
        yield folder


def write_bundle_manifest(
    folder: Path, config: Config, tools: dict[str, str], origins: Sequence[Origin]
) -> Manifest:
    """Write the manifest of a bundle whose other files are complete.

    Args:
        folder: The bundle.
        config: Its model.
        tools: Version of each package that made the graphs.
        origins: Of the weights; none where nothing is known of them.

    Returns:
        The manifest.
    """
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        config=config,
        graphs=contract(config),
        files={path.name: file_record(path) for path in sorted(folder.iterdir())},
        tools=tools,
        origins=tuple(origins),
    )
    write_manifest(folder, manifest)
    return manifest


def save_graph(graph: ir.Model, path: Path) -> None:
    """Write a graph, with its weights in a file beside it if they exceed `INLINE_BYTES`."""
    weight_bytes = sum(
        value.const_value.nbytes
        for value in graph.graph.initializers.values()
        if value.const_value is not None
    )
    weights_file = f"{path.name}.data" if weight_bytes > INLINE_BYTES else None
    if weights_file is None:  # or weights read from beside another graph would be sought here
        ir.external_data.load_to_model(graph)
    ir.save(graph, path, external_data=weights_file)


class _FileList(msgspec.Struct):
    schema_version: int
    files: dict[str, object]


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder holds a bundle of any schema version and nothing else."""
    if not folder.is_dir():
        return False
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_FileList)
    except (OSError, ValueError):
        return False
    names = {entry.name for entry in folder.iterdir()}
    return names <= {MANIFEST, ENGINE_FOLDER, *manifest.files}
