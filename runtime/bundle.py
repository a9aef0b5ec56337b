"""The bundle: a folder with ONNX graphs, and a manifest that describes them.

The contract between export and runtime is this table: every tensor, and who writes it. P is the
channels of a token, D the width, H heads, d the head size, L layers, T text rows. N new and C
context tokens stay symbolic in ONNX. Large tensors have the dtypes of the config's precision:
k_ctx, v_ctx, k_new and v_new that of the cache; cross_k, cross_v, extra, position tables, pixels,
the decoder's frames and state that of the computation. The others are float32.

    prompt       in   text                  [1, T, text_dim]   text encoder
                 out  cross_k.l, cross_v.l  [1, H, T, d]       once per prompt
    denoiser     in   tokens                [1, N, P]          sampler; in the mid pass, compressor
                      extra                 [1, N, D]          zeros; in the mid pass, compressor
                      timestep              [1]                sampler, 0 to 1000
                      cross_k.l, cross_v.l  [1, H, T, d]       prompt
                      rope_cos, rope_sin    [N, d/2]           positions of the new tokens
                      ctx_cos, ctx_sin      [C, d/2]           packed positions of the context
                      k_ctx.l, v_ctx.l      [1, H, C, d]       cache, keys before RoPE
                      kv_len                [1] int64          N + valid context tokens
                 out  flow                  [1, N, P]
                      k_new.l, v_new.l      [1, H, N, d]       keys before RoPE
                      q_pool, k_pool        [L, H, d]          means over N, before RoPE
    compressor   in   latents               [1, B_f, C, h, w]  clean block (with a high branch)
                      pixels                [1, 4 B_f, 3, H, W] the same, decoded, 0 to 1
                 out  tokens                [1, N_c, P]
                      extra                 [1, N_c, D]
    vae_decoder  in   latent                [1, C, h, w]       one latent frame
                      state.i                                  the last call's new_state.i
                 out  frames                [4, 3, H, W]       0 to 1
                      new_state.i
    vae_encoder  in   frames                [4, 3, H, W]       0 to 1
                      state.i
                 out  latent                [1, C, h, w]
                      new_state.i
"""

from __future__ import annotations

import hashlib
import mmap
import re
import stat
from pathlib import Path
from typing import Any

# NumPy first: where C code imports it, an interrupt of that import prints a traceback
import numpy  # noqa: F401  # isort: skip
import ml_dtypes  # noqa: F401  makes float8_e4m3fn known to NumPy
import msgspec

from packforcing.config import TEMPORAL_FACTOR, Config, Policy, Precision
from packforcing.errors import BundleError
from packforcing.files import FileRecord, Upgrade, VersionError, decode_versioned, file_record
from packforcing.geometry import decoder_state_shapes, encoder_state_shapes
from packforcing.origins import Origin
from packforcing.runtime.arguments import check_path

SCHEMA_VERSION = 6
# of older manifests; none of the first two versions is read
UPGRADES: dict[int, Upgrade] = {
    3: lambda fields: {**fields, "license": ""},
    4: lambda fields: fields,  # version 5 adds `policy.commit` and `precision.attention`
    5: lambda fields: _with_origins(**fields),
}
# Fields of a policy and a precision that digests leave out at these values: they came later than
# renders and jobs which are still to be resumed
LATER_FIELDS = {"commit": "clean", "attention": None}
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 1 << 24  # bytes
ENGINE_FOLDER = (
    "engines"  # the folder of what was built from the graphs (runtime/engine_records.py)
)
# NumPy's names of the dtypes of `Precision`
DTYPES = {
    "fp32": "float32",
    "fp16": "float16",
    "int8": "int8",
    "fp8": "float8_e4m3fn",
}
GPU_GRAPHS = ("denoiser", "compressor", "vae_decoder")  # the others run on the host
GPU_CALLS = {  # calls of these and their graphs: the denoiser has two shapes
    "denoiser.block": "denoiser",
    "denoiser.compressed": "denoiser",
    "compressor": "compressor",
    "vae_decoder": "vae_decoder",
}
Shape = tuple[int | str, ...]  # a name stands for an axis that stays symbolic in ONNX


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a graph."""

    name: str
    shape: Shape
    dtype: str = "float32"


class GraphSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The inputs and outputs of a graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of `manifest.json`."""

    schema_version: int
    config: Config
    graphs: dict[str, GraphSpec]
    files: dict[str, FileRecord]
    tools: dict[str, str]
    origins: tuple[Origin, ...]  # of the weights; none where nothing is known of them
    sha256: str = ""  # of the file without this value; `write_manifest` sets it


def _with_origins(license: str, **fields: Any) -> dict[str, Any]:
    """Turn a manifest of version 5, which has one license, into one of version 6."""
    origins = [{"part": "model", "source": "", "license": license}] if license else []
    return {**fields, "origins": origins}


def contract(config: Config) -> dict[str, GraphSpec]:
    """Return the graphs of a bundle of this config, as in the table above."""
    h, w = config.latent_size
    latent = (1, config.latent_channels, h, w)
    frames = (TEMPORAL_FACTOR, 3, config.height, config.width)
    half = config.head_dim // 2
    compute, cache = DTYPES[config.precision.compute], DTYPES[config.precision.cache]

    def per_layer(*prefixes: str, shape: Shape, dtype: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"{prefix}.{layer}", shape, dtype)
            for layer in range(config.layers)
            for prefix in prefixes
        )

    def states(
        prefix: str, shapes: list[tuple[int, ...]], dtype: str = "float32"
    ) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"{prefix}.{i}", shape, dtype) for i, shape in enumerate(shapes))

    cross = per_layer(
        "cross_k",
        "cross_v",
        shape=(1, config.heads, config.text_len, config.head_dim),
        dtype=compute,
    )
    pool = (config.layers, config.heads, config.head_dim)
    decoder, encoder = decoder_state_shapes(config), encoder_state_shapes(config)
    high_branch = (TensorSpec("latents", (1, config.block_frames, *latent[1:])),)
    return {
        "prompt": GraphSpec(
            inputs=(TensorSpec("text", (1, config.text_len, config.text_dim)),),
            outputs=cross,
        ),
        "denoiser": GraphSpec(
            inputs=(
                TensorSpec("tokens", (1, "N", config.token_dim)),
                TensorSpec("extra", (1, "N", config.dim), compute),
                TensorSpec("timestep", (1,)),
                *cross,
                TensorSpec("rope_cos", ("N", half), compute),
                TensorSpec("rope_sin", ("N", half), compute),
                TensorSpec("ctx_cos", ("C", half), compute),
                TensorSpec("ctx_sin", ("C", half), compute),
                *per_layer(
                    "k_ctx", "v_ctx", shape=(1, config.heads, "C", config.head_dim), dtype=cache
                ),
                TensorSpec("kv_len", (1,), "int64"),
            ),
            outputs=(
                TensorSpec("flow", (1, "N", config.token_dim)),
                *per_layer(
                    "k_new", "v_new", shape=(1, config.heads, "N", config.head_dim), dtype=cache
                ),
                TensorSpec("q_pool", pool),
                TensorSpec("k_pool", pool),
            ),
        ),
        "compressor": GraphSpec(
            inputs=(
                *(high_branch if config.compressor_widths else ()),
                TensorSpec("pixels", (1, config.block_pixel_frames, *frames[1:]), compute),
            ),
            outputs=(
                TensorSpec("tokens", (1, config.compressed_tokens, config.token_dim)),
                TensorSpec("extra", (1, config.compressed_tokens, config.dim), compute),
            ),
        ),
        "vae_decoder": GraphSpec(
            inputs=(TensorSpec("latent", latent), *states("state", decoder, compute)),
            outputs=(TensorSpec("frames", frames, compute), *states("new_state", decoder, compute)),
        ),
        "vae_encoder": GraphSpec(
            inputs=(TensorSpec("frames", frames), *states("state", encoder)),
            outputs=(TensorSpec("latent", latent), *states("new_state", encoder)),
        ),
    }


def graph_file(name: str) -> str:
    """Return the file name of a graph."""
    return f"{name}.onnx"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, after the graphs."""
    unsealed = msgspec.structs.replace(manifest, sha256="")
    text = msgspec.json.format(msgspec.json.encode(unsealed), indent=1) + b"\n"
    head, _, tail = text.rpartition(b'""')  # of `sha256`, the last field
    digest = hashlib.sha256(head + b'""' + tail).hexdigest()
    (directory / MANIFEST).write_bytes(head + f'"{digest}"'.encode() + tail)


def bundle_digest(manifest: Manifest) -> str:
    """Return a SHA-256 of all in a manifest that decides about frames: origins of weights do not.

    It is as it was for schema version 3, so that renders and jobs begun then go on.
    """
    fields = msgspec.structs.asdict(manifest)
    del fields["origins"]
    config = msgspec.structs.asdict(manifest.config)
    config |= {name: digest_fields(config[name]) for name in ("policy", "precision")}
    fields |= {"schema_version": 3, "config": config}
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


def digest_fields(part: Policy | Precision) -> dict[str, Any]:
    """Return what a digest covers of a policy or a precision: see `LATER_FIELDS`."""
    fields = msgspec.structs.asdict(part)
    later = LATER_FIELDS.items()
    return {name: value for name, value in fields.items() if (name, value) not in later}


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check the manifest of a bundle; `check_files` checks the graphs.

    `UPGRADES` brings a manifest of an older schema version up to this one.

    Raises:
        BundleError: The manifest is missing or malformed, has a schema version that this release
            does not read, or lists graphs that are not those of its config.
    """
    check_path("cannot open the bundle", directory, BundleError)
    path = Path(directory) / MANIFEST
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST_MANIFEST + 1)
        if len(text) > LARGEST_MANIFEST:
            raise BundleError(f"{path} is no manifest: it is larger than {LARGEST_MANIFEST} bytes")
    except OSError as error:
        raise BundleError(
            f"{directory} is not a bundle: cannot read {MANIFEST} ({error.strerror}); "
            "make one with 'packforcing export'"
        ) from error
    try:
        manifest = decode_versioned(
            text, Manifest, SCHEMA_VERSION, UPGRADES, "export the bundle again", "schema_version"
        )
    except VersionError as error:
        raise BundleError(f"{path} {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged: {error}") from error
    expected = contract(manifest.config)
    for name in expected.keys() | manifest.graphs.keys():
        if expected.get(name) != manifest.graphs.get(name):
            raise BundleError(
                f"{path}: graph '{name}' is not what its config calls for; export the bundle again"
            )
    for name in expected:
        if graph_file(name) not in manifest.files:
            raise BundleError(f"{path} does not list {graph_file(name)}; export the bundle again")
    for name in manifest.files:
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise BundleError(f"{path} names {name!r}, which is not a file inside the bundle")
    head, _, tail = text.rpartition(f'"{manifest.sha256}"'.encode())
    if hashlib.sha256(head + b'""' + tail).hexdigest() != manifest.sha256:
        raise BundleError(
            f"{path} is damaged: its SHA-256 differs; export or download the bundle again"
        )
    return manifest


def check_files(directory: str | Path, manifest: Manifest) -> None:
    """Compare every listed file of a bundle with its manifest.

    A link counts as what it leads to, since that is how caches of the hub keep files. Other files
    may lie beside the listed ones, like a model card, as long as no graph reads its weights there:
    no hash would cover them. Engines have a folder of their own.

    Raises:
        BundleError: Names the first file that is missing or damaged, or weights that are not
            listed.
    """
    for name, record in manifest.files.items():
        path = Path(directory) / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{path} is no file; put the file itself there")
            # the size first: what is far too large need not be read
            if status.st_size != record.bytes or file_record(path) != record:
                raise BundleError(
                    f"{path} is damaged (its SHA-256 differs); export or download it again"
                )
        except OSError as error:
            raise BundleError(
                f"the bundle lacks {path} ({error.strerror}); export or download it again"
            ) from error
    for graph in manifest.graphs:
        for name in sorted(weight_files(Path(directory) / graph_file(graph))):
            if name not in manifest.files:
                raise BundleError(
                    f"{graph_file(graph)} reads weights from '{name}', which the manifest of "
                    f"{directory} does not list; export or download the bundle again"
                )


def weight_files(graph: Path) -> set[str]:
    """Return the names of the files that a graph reads weights from.

    ONNX writes them as entries "location" of its tensors: field 1 of a message with the key, field
    2 with the value, each a length and its bytes (Protocol Buffers' encoding).
    """
    names = set[str]()
    if not graph.stat().st_size:  # cannot be mapped
        return names
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for entry in re.finditer(rb"\n\x08location\x12([\x80-\xff]{0,4}[\0-\x7f])", content):
            length = sum((byte & 0x7F) << (7 * place) for place, byte in enumerate(entry[1]))
            names.add(content[entry.end() : entry.end() + length].decode("utf-8", "replace"))
    return names
