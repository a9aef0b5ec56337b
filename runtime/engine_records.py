"""The engines of a bundle: where they are, what they were built from, and which are usable.

    BUNDLE/engines/<backend>/<graph>.engine    the engine
                             <graph>.json      its record, written last
                             <graph>.log       the builder's messages of the last build

An engine is loaded only if it has an intact record, is byte for byte the file that the record
describes, and was built from the graph that the bundle has now. So a build that is interrupted
leaves engines that are usable or are not loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from packforcing.config import Config
from packforcing.errors import BackendError
from packforcing.files import (
    FileRecord,
    Upgrade,
    VersionError,
    decode_versioned,
    file_record,
    seal_json,
    unseal_json,
)
from packforcing.runtime.bundle import (
    ENGINE_FOLDER,
    GPU_CALLS,
    GPU_GRAPHS,
    Manifest,
    graph_file,
    read_manifest,
)

VERSION = 2
# Records of version 1 say none, and know no kernels
UPGRADES: dict[int, Upgrade] = {1: lambda fields: {"version": 2, **fields, "kernels": []}}
Length = Literal["input", "mask"]


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that an engine depends on; with another key it is built again."""

    graph: dict[str, str]  # SHA-256 of the graph's file and of those that hold its weights
    tool: str  # name and version of what built it
    targets: tuple[str, ...]
    shapes: dict[str, dict[str, int]]  # per call, sizes of the axes that its graph leaves open
    length: Length | None = None  # how attention gets `kv_len`; None where there is none
    flags: tuple[str, ...] = ()  # of the builder


class Kernels(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The kernels of an engine that do one kind of work on operands of the same dtypes.

    Attributes:
        call: What they are part of, like "denoiser.block".
        kind: Attention, or products with stored matrices.
        operands: dtypes of queries, keys and values, or of activations and matrix.
        count: Kernels.
        weights: Values of the products' matrices; 0 for attention.
    """

    call: str
    kind: Literal["attention", "product"]
    operands: tuple[str, ...]
    count: int
    weights: int = 0


class EngineRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An engine's key, its file and the builder's figures, in bytes and seconds.

    The builder lists the kernels of an engine once, whatever the number of its targets.
    """

    version: int = VERSION
    key: Key
    file: FileRecord
    weights: int
    scratch: dict[str, int]  # per call
    seconds: float
    peak_memory: int  # resident, of the process that built it
    kernels: tuple[Kernels, ...]  # that the builder lists; none in records made before version 2

    @property
    def figures(self) -> dict[str, int]:
        """Bytes on the GPU, under the names of `packforcing.runtime.plan.estimates`."""
        graph = next(GPU_CALLS[call] for call in self.scratch)
        scratch = {f"scratch.{call}": size for call, size in self.scratch.items()}
        return {f"weights.{graph}": self.weights, **scratch}


def engine_file(directory: str | Path, backend: str, graph: str) -> Path:
    """Return the path of an engine."""
    return Path(directory) / ENGINE_FOLDER / backend / f"{graph}.engine"


def record_file(directory: str | Path, backend: str, graph: str) -> Path:
    """Return the path of an engine's record."""
    return engine_file(directory, backend, graph).with_suffix(".json")


def graph_files(manifest: Manifest, graph: str) -> dict[str, str]:
    """Return the SHA-256 of the files that an engine is built from, as the manifest has them."""
    name = graph_file(graph)
    return {
        file: record.sha256
        for file, record in manifest.files.items()
        if file == name or file.startswith(f"{name}.")
    }


def shapes(config: Config, graph: str) -> dict[str, dict[str, int]]:
    """Return the calls that an engine serves, with the sizes of the axes its graph leaves open."""
    new = {"denoiser.block": config.block_tokens, "denoiser.compressed": config.compressed_tokens}
    return {
        call: {"N": new[call], "C": config.context_tokens} if call in new else {}
        for call, name in GPU_CALLS.items()
        if name == graph
    }


def differences(built: Key, current: Key) -> list[str]:
    """Say why an engine has to be built again.

    Args:
        built: The key that it was built with.
        current: The key that it would be built with now.

    Returns:
        A phrase per difference; empty where there is none.
    """

    def words(key: Key) -> dict[str, str]:
        sizes = [
            " ".join(f"{axis}={n}" for axis, n in call.items()) for call in key.shapes.values()
        ]
        return {
            "tool": key.tool,
            "targets": " ".join(key.targets),
            "shapes": ", ".join(sizes),
            "length": f"as {key.length}",
            "flags": " ".join(key.flags) or "none",
        }

    changed = ["its graph changed"] if built.graph != current.graph else []
    before, now = words(built), words(current)
    return changed + [
        f"{part} {'were' if part.endswith('s') else 'was'} {before[part]}, now {now[part]}"
        for part in now
        if before[part] != now[part]
    ]


def describe_kernels(kernels: Iterable[Kernels]) -> str:
    """Describe in a line what runs in which dtypes, like "attention fp8 (30), fp16 (30)".

    Args:
        kernels: Of one call.
    """
    parts: dict[str, list[str]] = {}
    for entry in kernels:
        dtypes = " x ".join(dict.fromkeys(entry.operands))
        amount = f"{entry.weights / 1e6:.1f} M weights" if entry.weights else f"{entry.count}"
        parts.setdefault(entry.kind, []).append(f"{dtypes} ({amount})")
    return "; ".join(f"{kind} {', '.join(texts)}" for kind, texts in parts.items())


def encode_record(record: EngineRecord) -> bytes:
    """Encode a record as JSON with a checksum."""
    return seal_json("engine", msgspec.json.format(msgspec.json.encode(record), indent=1))


def read_record(directory: str | Path, backend: str, graph: str) -> EngineRecord | None:
    """Read the record of an engine; the engine itself is not read.

    `UPGRADES` brings a record of an older version up to this one.

    Returns:
        The record, or None where no engine is built.

    Raises:
        BackendError: The record is damaged, or has a version that this release does not read.
    """
    path = record_file(directory, backend, graph)
    try:
        body = unseal_json("engine", path.read_bytes())
        return decode_versioned(body, EngineRecord, VERSION, UPGRADES, _build(directory))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BackendError(f"cannot read {path}: {error.strerror}") from error
    except VersionError as error:
        raise BackendError(f"{path} {error}") from error
    except (ValueError, RecursionError) as error:
        raise BackendError(f"{path} is damaged ({error}): {_build(directory)}") from error


def check_engine(directory: str | Path, backend: str, graph: str, record: EngineRecord) -> None:
    """Read an engine and compare it with its record.

    Raises:
        BackendError: It is missing, or not the file that the record describes.
    """
    path = engine_file(directory, backend, graph)
    try:
        engine = file_record(path)
    except OSError as error:
        raise BackendError(f"cannot read {path} ({error.strerror}): {_build(directory)}") from error
    if engine != record.file:
        raise BackendError(f"{path} is damaged (its SHA-256 differs): {_build(directory)}")


def read_records(directory: str | Path, backend: str) -> dict[str, EngineRecord]:
    """Read the records of a bundle's engines, and every engine once.

    Raises:
        BackendError: An engine is missing, damaged or built from another graph.
    """
    records = current_records(directory, backend)
    for graph, record in records.items():
        check_engine(directory, backend, graph, record)
    return records


def current_records(directory: str | Path, backend: str) -> dict[str, EngineRecord]:
    """Read the records of a bundle's engines; the engines themselves are not read.

    Raises:
        BackendError: A record is missing, damaged or of another graph.
    """
    manifest = read_manifest(directory)
    records: dict[str, EngineRecord] = {}
    for graph in GPU_GRAPHS:
        record = read_record(directory, backend, graph)
        if record is None:
            raise BackendError(
                f"{graph} of {directory} is not built for {backend}: {_build(directory)}"
            )
        if record.key.graph != graph_files(manifest, graph):
            raise BackendError(
                f"{engine_file(directory, backend, graph)} was built from another graph than the "
                f"bundle holds now: {_build(directory)}"
            )
        records[graph] = record
    return records


def _build(directory: str | Path) -> str:
    return f"run 'packforcing build {directory}'"
