"""Published checkpoints into model folders: recognised, checked by name and shape, copied.

What a file is for is told from its contents: which container it is, which of a torch
checkpoint's entries hold tensors, and whether those are a transformer's, an autoencoder's or a
LoRA's. Several models have the very same tensors, and so have the two tiny autoencoders; where
these cannot tell them apart, the name under which a file is published does, or the caller.

Nothing in a file is ever executed. Tensors are copied one at a time from mapped files, one file
after the other, so that memory stays near the size of the largest.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from packforcing.checkpoints.fetch import recorded
from packforcing.checkpoints.published import (
    AUTOENCODER_PARTS,
    DESCRIPTION,
    PARTS,
    PUBLISHED,
    WEIGHTS,
    ModelFolder,
    published,
    published_config,
)
from packforcing.config import Config
from packforcing.errors import CheckpointError, OutputError
from packforcing.model import mismatch, weight_shapes
from packforcing.presets import PAPER, TINY_AUTOENCODERS, with_autoencoder

# safetensors' names of the number formats that weights may have, and their bytes
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BYTES = {"F32": 4, "F16": 2, "BF16": 2}

# what training and PEFT wrap around a name
WRAPPING = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
PREFIX = re.compile(r"^(base_model\.model\.)?(model\.)?")

# diffusers' names to Wan's; diffusers: scripts/convert_wan_to_diffusers.py goes the other way
DIFFUSERS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^condition_embedder\.text_embedder\.linear_1\b", "text_embedding.0"),
        (r"^condition_embedder\.text_embedder\.linear_2\b", "text_embedding.2"),
        (r"^condition_embedder\.time_embedder\.linear_1\b", "time_embedding.0"),
        (r"^condition_embedder\.time_embedder\.linear_2\b", "time_embedding.2"),
        (r"^condition_embedder\.time_proj\b", "time_projection.1"),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\b", "head.head"),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"_attn\.to_out\.0\b", "_attn.o"),
        (r"_attn\.to_([qkv])\b", r"_attn.\1"),
        (r"^(blocks\.\d+)\.norm2\b", r"\1.norm3"),
        (r"\.ffn\.net\.0\.proj\b", ".ffn.0"),
        (r"\.ffn\.net\.2\b", ".ffn.2"),
    )
]
LORA = re.compile(r"^(.+)\.(?:(?:lora_(A|B|down|up)(?:\.default)?\.weight)|alpha)$")

LONGLIVE = "generator_lora"  # the entry of LongLive's

# The unofficial PackForcing's compressor makes 273 tokens a block that every layer projects. It
# fits neither the paper's compressor nor its mid pass: the low branch takes its place.
PACK = [
    f"transformer.pack_compressor.net.{layer}.{kind}"
    for layer in (0, 2, 4, 6)
    for kind in ("weight", "bias")
]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    entry: str  # of a torch checkpoint; "" where the file is not divided
    name: str  # as the file has it
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


Tensors = dict[str, Stored]  # by the name it has in Wan, in TAEHV or in diffusers' AutoencoderKLWan


@dataclass(frozen=True)
class File:
    """What a file holds, and for what: "transformer", "autoencoder" or "LoRA"."""

    path: Path
    entries: dict[str, Tensors]
    role: str
    vae: str = ""  # which autoencoder: "wan", or "taehv" for either of the tiny ones


@dataclass(frozen=True)
class Lora:
    """A low-rank addition to a weight, scale up down."""

    up: Stored  # [out, rank]
    down: Stored  # [rank, in]
    scale: float


@dataclass(frozen=True)
class Imported:
    """What `import_checkpoint` did."""

    folder: ModelFolder
    why: str  # it was taken for this kind
    said: list[str]  # what was taken of each file, and what became of it
    tensors: int
    bytes: int


def import_checkpoint(
    files: Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    *,
    kind: str | None = None,
    entry: str | None = None,
    vae: str | None = None,
    lora_alpha: float | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Imported:
    """Makes a folder that `packforcing export` reads of the model in `files`.

    files: torch checkpoints, safetensors files, indices of sharded ones, or folders of the
    latter two: one model, and perhaps LoRAs to merge into it and an autoencoder's weights.
    kind: a name in `published.PUBLISHED`, instead of the recognised one. entry: of a
    torch checkpoint, instead of the one that models of this kind are run with. vae: which of the
    tiny autoencoders it is, "taehv" or "lighttae", instead of by name. lora_alpha: LoRAs
    that do not hold their alpha are scaled by it over their rank, by 1 if None. on_tensor is told
    how many tensors are written, of how many.

    Number formats stay as they are. Raises `CheckpointError`, before anything is written, for
    what is missing, damaged, unsafe, of another model or not what `fetch` recorded, and, with
    nothing left behind, for a LoRA that makes a weight overflow; `OutputError` when the folder
    cannot be written.
    """
    if kind is not None:
        published(kind)
    given = [survey(part) for file in files for part in parts(Path(file))]
    names, roles = ", ".join(map(str, files)), [file.role for file in given]
    if "transformer" not in roles:
        raise CheckpointError(f"no file here holds a model, only {names}: name its checkpoint too")
    kind, why = (kind, "as asked for") if kind else recognise(given)
    row, config = published(kind), published_config(kind)
    autoencoders = [file for file in given if file.role == "autoencoder"]
    if autoencoders:
        vae = recognise_autoencoder(autoencoders, vae)
        config = with_autoencoder(config, vae)
    if row.lora and "LoRA" not in roles:
        raise CheckpointError(
            f"{kind} is {row.files[0]} with {row.files[1]} merged into it: name both files, or "
            "import the base as another model with --kind"
        )
    used = [(file, choose(file, kind, entry)) for file in given]
    tensors = join(used)
    check(config, kind, tensors, names)
    loras = [
        additions(file.path, part, tensors, lora_alpha)
        for file, part in used
        if file.role == "LoRA"
    ]
    fetched = {file.role: record for file in given if (record := recorded(file.path))}
    folder = ModelFolder(
        kind=kind,
        config=config,
        autoencoder=bool(autoencoders),
        made_from=[Path(file).name for file in files],
        source=row.source,
        licence=fetched["transformer"].licence if "transformer" in fetched else row.licence,
    )
    kept = {name: stored for name, stored in tensors.items() if name not in PACK}
    size = write_folder(Path(directory), folder, kept, loras, on_tensor)
    said = [describe(file, part) for file, part in used]
    for lora in loras:
        scales = ", ".join(f"{scale:g}" for scale in sorted({one.scale for one in lora.values()}))
        said.append(f"LoRA merged into {len(lora)} weights at scale {scales}")
    if autoencoders and vae:
        part = AUTOENCODER_PARTS[vae]
        said.append(f"the autoencoder is {part}, licence of its weights: {PARTS[part].licence}")
    if len(kept) < len(tensors):
        said.append("pack_compressor left out: it is not the paper's; the low branch serves alone")
    return Imported(folder, why, said, len(kept), size)


# What files hold


def parts(path: Path) -> list[Path]:
    """The files that a path stands for: a sharded checkpoint's index or folder names several."""
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if not found:
            raise CheckpointError(f"the folder {path} holds no .safetensors file: name a file")
        return [part for file in found for part in parts(file)]
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        found = [path.parent / shard for shard in shards]
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path} is not the index of a sharded checkpoint") from error
    if missing := [shard.name for shard in found if not shard.is_file()]:
        raise CheckpointError(f"{path} lists files that are not beside it: {', '.join(missing)}")
    return found


def survey(path: Path) -> File:
    """What a file holds and for what; no weight is read."""
    entries: dict[str, Tensors] = {}
    for stored in contents(path):
        tensors, name = entries.setdefault(stored.entry, {}), wan_name(stored.name)
        if name in tensors:
            raise CheckpointError(
                f"{path} holds {name} twice, as {tensors[name].name} and {stored.name}"
            )
        tensors[name] = stored
    names = {name for tensors in entries.values() for name in tensors}
    if any(LORA.match(name) for name in names):
        return File(path, entries, "LoRA")
    known = weight_shapes(PAPER)
    for role, vae in (("transformer", ""), ("autoencoder", "taehv")):
        if 2 * sum(f"{role}.{name}" in known for name in names) > len(names):
            return File(path, entries, role, vae)
    known = weight_shapes(with_autoencoder(PAPER, "wan"))
    renamed = {entry: wan_vae_names(tensors) for entry, tensors in entries.items()}
    held = [name for tensors in renamed.values() for name in tensors]
    if 2 * sum(f"autoencoder.{name}" in known for name in held) > len(held):
        return File(path, renamed, "autoencoder", "wan")
    raise CheckpointError(
        f"{path} holds none of what is read here, which is a Wan transformer, a LoRA for it or "
        f"an autoencoder, but {len(names)} other tensors: {', '.join(sorted(names)[:3])}, ..."
    )


def wan_vae_names(tensors: Tensors) -> Tensors:
    """The tensors by the names that diffusers has for those of Wan's VAE; others keep theirs."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    try:
        renamed = convert_wan_vae_to_diffusers(tensors)
    except (ValueError, IndexError):  # it expects numbers where another model's names have none
        return tensors
    for name, stored in tensors.items():
        if stored not in renamed.values():
            raise CheckpointError(f"{stored.path} holds {name} twice, under two names")
    return renamed


def contents(path: Path) -> Iterator[Stored]:
    """The tensors of a file, in its order."""
    if is_torch(path):
        for entry, tensors in load_torch(path).items():
            for name, tensor in tensors.items():
                dtype = DTYPES.get(tensor.dtype, str(tensor.dtype))
                yield Stored(path, entry, name, tuple(tensor.shape), dtype)
        return
    file = open_safetensors(path)
    for name in file.keys():  # noqa: SIM118
        tensor = file.get_slice(name)
        yield Stored(path, "", name, tuple(tensor.get_shape()), tensor.get_dtype())


def reader(path: Path) -> Callable[[Stored], Tensor]:
    """Gives tensors of one file, which stays mapped for as long as this is kept."""
    if is_torch(path):
        entries = load_torch(path)
        return lambda stored: entries[stored.entry][stored.name]
    file = open_safetensors(path)
    return lambda stored: file.get_tensor(stored.name)


def is_torch(path: Path) -> bool:
    """Whether a file is torch's; raises `CheckpointError` for a bare pickle, torch's old format."""
    try:
        with path.open("rb") as file:
            magic = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    # safetensors begins with the length of its header, which may begin like a pickle
    if magic[:1] == b"\x80" and magic[8:] != b"{":
        raise CheckpointError(
            f"{path} is a bare pickle, which could run code and cannot be read in pieces: "
            "ask for safetensors, or save it with a current torch where you trust it"
        )
    return magic[:4] == b"PK\x03\x04"


def load_torch(path: Path) -> dict[str, dict[str, Tensor]]:
    """The entries of a torch checkpoint, mapped and not read; "" if it is not divided."""
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not unsafe:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle calls torch's functions with whatever it holds
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"cannot read {path}, which is damaged or no torch checkpoint: {reason}"
        ) from error
    if unsafe:
        raise CheckpointError(
            f"{path} would run code when loaded ({', '.join(sorted(unsafe)[:3])}) and is "
            "refused: ask for safetensors"
        )
    if not isinstance(content, Mapping):
        content = {}
    entries = {"": content, **content}
    found = {
        str(entry): {
            name: value
            for name, value in values.items()
            if isinstance(name, str) and isinstance(value, Tensor) and not value.is_sparse
        }
        for entry, values in entries.items()
        if isinstance(values, Mapping)
    }
    found = {entry: tensors for entry, tensors in found.items() if tensors}
    if not found:
        raise CheckpointError(f"{path} holds no tensors under names")
    return found


def open_safetensors(path: Path) -> Any:
    """A safetensors file, mapped and not read."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path}, which is damaged or neither safetensors nor a torch "
            f"checkpoint: {error}"
        ) from error


def wan_name(name: str) -> str:
    """A tensor's name as Wan has it: without wrappers, and not as diffusers has it."""
    name = PREFIX.sub("", WRAPPING.sub("", name))
    for pattern, wan in DIFFUSERS:
        name = pattern.sub(wan, name)
    return name


# Which model that is


def recognise(files: list[File]) -> tuple[str, str]:
    """The kind of a model and what tells it; raises `CheckpointError` if nothing does."""
    models = [file for file in files if file.role == "transformer"]
    names = {name for file in models for tensors in file.entries.values() for name in tensors}
    if any(f"transformer.{name}" in PACK for name in names):
        return "packforcing-unofficial", "it has a pack_compressor"
    if any(LONGLIVE in file.entries for file in files):
        return "longlive", f"its LoRA is a '{LONGLIVE}'"
    kinds = {kind: row for kind, row in PUBLISHED.items() if row.entry}
    for kind, row in kinds.items():
        for name in row.files[:1]:
            known = name.removeprefix("checkpoints/").removeprefix("models/")
            if any(file.path.absolute().match(known) for file in models):
                return kind, f"{known} is what it is published as"
    plain = [stored.name for file in models for stored in file.entries.get("", {}).values()]
    if plain and not any(name.startswith("model.") for name in plain):
        return "wan2.1-t2v-1.3b", "its tensors are not divided and have no prefix"
    raise CheckpointError(
        f"{models[0].path} holds a causal Wan model, and its tensors do not say which: name it "
        f"with --kind, one of {', '.join(kinds)}"
    )


def recognise_autoencoder(files: list[File], asked: str | None) -> str:
    """Which autoencoder it is; raises `CheckpointError` if nothing tells, or there are several."""
    layouts = {file.vae for file in files}
    if len(layouts) > 1:
        raise CheckpointError(
            f"{' and '.join(str(file.path) for file in files)} are two autoencoders: name one"
        )
    (layout,) = layouts
    fitting = ["wan"] if layout == "wan" else TINY_AUTOENCODERS
    if asked is not None:
        if asked not in fitting:
            raise CheckpointError(
                f"{files[0].path} is no '{asked}' by its tensors, but {' or '.join(fitting)}"
            )
        return asked
    if layout == "wan":
        return layout
    name = files[0].path.name
    named = [known for known in fitting if AUTOENCODER_PARTS[known] in name]
    if named:  # one's name has the other's in it
        return max(named, key=lambda known: len(AUTOENCODER_PARTS[known]))
    raise CheckpointError(
        f"{files[0].path} is a tiny autoencoder, and its tensors do not say for latents of which "
        "scale: name it with --vae, taehv (as taew2_1) or lighttae (as lighttaew2_1)"
    )


def choose(file: File, kind: str, entry: str | None) -> Tensors:
    """What is used of a file; raises `CheckpointError` where that is nothing or unclear.

    entry: of a transformer's, instead of the one that its kind is run with.
    """
    entries, wanted = file.entries, ""
    if file.role == "transformer":
        wanted = entry or published(kind).entry
    elif file.role == "LoRA":
        entries = {e: t for e, t in entries.items() if any(LORA.match(name) for name in t)}
        wanted = LONGLIVE  # its critic's is there as well
    if wanted in entries:
        return entries[wanted]
    if len(entries) == 1 and (file.role != "transformer" or (not entry and "" in entries)):
        return next(iter(entries.values()))
    held = ", ".join(f"'{entry}'" for entry in entries if entry) or "no entries"
    if not wanted:
        raise CheckpointError(
            f"{file.path} is divided into {held}, which {kind} is not: name another --kind"
        )
    raise CheckpointError(
        f"{file.path} has no entry '{wanted}', which {kind} is run with, but {held}: choose an "
        "entry with --entry, or another --kind"
    )


def join(used: list[tuple[File, Tensors]]) -> Tensors:
    """The tensors of the model and the autoencoder, by checkpoint name."""
    joined: Tensors = {}
    for file, tensors in used:
        for name, stored in tensors.items() if file.role != "LoRA" else ():
            if other := joined.get(f"{file.role}.{name}"):
                raise CheckpointError(
                    f"both {other.path} and {file.path} hold {name}: name the files of one model"
                )
            joined[f"{file.role}.{name}"] = stored
    return joined


def check(config: Config, kind: str, tensors: Tensors, files: str) -> None:
    """Raises `CheckpointError` unless these are the weights of a model, in formats read here."""
    found = {name: stored.shape for name, stored in tensors.items()}
    wanted = dict(weight_shapes(config))
    if not any(name.startswith("autoencoder.") for name in found):
        wanted = {name: shape for name, shape in wanted.items() if name.startswith("transformer.")}
    if kind == "packforcing-unofficial":
        wanted |= {name: found.get(name, ()) for name in PACK}
    if problems := mismatch(found, wanted):
        raise CheckpointError(f"{files} does not hold the weights of {kind} {problems}")
    check_formats(tensors)


def check_formats(tensors: Tensors) -> None:
    """Raises `CheckpointError` unless all of these are in number formats read here."""
    for stored in tensors.values():
        if stored.dtype not in BYTES:
            raise CheckpointError(
                f"{stored.path} holds {stored.name} as {stored.dtype}, and {', '.join(BYTES)} "
                "can be read: use the original weights"
            )


def additions(path: Path, lora: Tensors, tensors: Tensors, alpha: float | None) -> dict[str, Lora]:
    """What a LoRA adds, by the checkpoint name of the weight; raises `CheckpointError`."""
    pieces: Tensors = {}
    for name, stored in lora.items():
        match = LORA.match(name)
        piece = {"A": "A", "down": "A", "B": "B", "up": "B"}.get(match[2], "alpha") if match else ""
        pieces[f"{match[1]}.{piece}" if match else name] = stored
    modules = {name.rpartition(".")[0] for name in pieces}
    wanted: dict[str, tuple[int, ...]] = {}
    for module in modules:
        weight = tensors.get(f"transformer.{module}.weight")
        if weight and len(weight.shape) == 2:
            down = pieces.get(f"{module}.A")
            rank = max(1, down.shape[0]) if down and down.shape else 1
            wanted[f"{module}.A"] = (rank, weight.shape[1])
            wanted[f"{module}.B"] = (weight.shape[0], rank)
            if own := pieces.get(f"{module}.alpha"):
                wanted[f"{module}.alpha"] = own.shape if math.prod(own.shape) == 1 else ()
    found = {name: stored.shape for name, stored in pieces.items()}
    if problems := mismatch(found, wanted):
        raise CheckpointError(f"the LoRA {path} does not fit the model {problems}")
    check_formats({name: stored for name, stored in pieces.items() if not name.endswith(".alpha")})
    read = reader(path)
    added = {}
    for module in {name.removesuffix(".A") for name in wanted if name.endswith(".A")}:
        down, up = pieces[f"{module}.A"], pieces[f"{module}.B"]
        own = pieces.get(f"{module}.alpha")
        scaled = read(own).item() if own else alpha
        scale = 1.0 if scaled is None else scaled / down.shape[0]
        if not math.isfinite(scale):
            raise CheckpointError(f"the alpha of {module} in the LoRA {path} is {scaled}")
        added[f"transformer.{module}.weight"] = Lora(up, down, scale)
    return added


def describe(file: File, tensors: Tensors) -> str:
    """A line about a file: what in it was used, and how it is stored."""
    first = next(iter(tensors.values()))
    beside = [entry for entry in file.entries if entry != first.entry]
    return (
        f"{file.path.name}: {file.role}, {len(tensors)} tensors"
        + (f" of '{first.entry}'" if first.entry else "")
        + (f" (not {', '.join(beside)})" if beside else "")
        + (", torch checkpoint" if is_torch(file.path) else ", safetensors")
        + (", in diffusers' naming" if any(map(in_diffusers, tensors.values())) else "")
    )


def in_diffusers(stored: Stored) -> bool:
    return ".attn1." in stored.name or ".mid_block." in stored.name


# Writing


def write_folder(
    directory: Path,
    folder: ModelFolder,
    tensors: Tensors,
    loras: list[dict[str, Lora]],
    on_tensor: Callable[[int, int], None] | None,
) -> int:
    """Writes weights and description beside `directory`, which then gets them; their bytes."""
    size = sum(BYTES[stored.dtype] * math.prod(stored.shape) for stored in tensors.values())
    try:
        target = directory.resolve()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise OutputError(f"{target} is there already; choose a new or an empty folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if size > free:
            raise OutputError(
                f"the model needs {size / 1e9:.1f} GB, {target.parent} has {free / 1e9:.1f} GB "
                "free: make room or choose a folder on another disk"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            write_weights(partial / WEIGHTS, folder.kind, tensors, loras, on_tensor)
            description = msgspec.json.format(msgspec.json.encode(folder), indent=1)
            (partial / DESCRIPTION).write_bytes(description)
            partial.chmod(0o755)
            if target.exists():
                target.rmdir()
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(f"cannot write {directory}: {error}") from error
    return size


def write_weights(
    path: Path,
    kind: str,
    tensors: Tensors,
    loras: list[dict[str, Lora]],
    on_tensor: Callable[[int, int], None] | None,
) -> None:
    """Copies tensors into one safetensors file, file after file, adding the LoRAs to them.

    By hand, as the library's writer wants all of them in memory. The wider formats come first,
    which keeps every tensor aligned.
    """
    order = sorted(tensors.items(), key=lambda item: (-BYTES[item[1].dtype], str(item[1].path)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "model": kind}}
    end = 0
    for name, stored in order:
        begin, end = end, end + BYTES[stored.dtype] * math.prod(stored.shape)
        header[name] = {
            "dtype": stored.dtype, "shape": stored.shape, "data_offsets": (begin, end)
        }  # fmt: skip
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    read_lora = {
        file: reader(file) for file in {one.up.path for lora in loras for one in lora.values()}
    }
    done = 0
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for file, group in groupby(order, key=lambda item: item[1].path):
            read = reader(file)
            for name, stored in group:
                tensor = read(stored)
                for lora in loras:
                    if one := lora.get(name):
                        tensor = merge(name, tensor, one, read_lora[one.up.path])
                out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                done += 1
                if on_tensor:
                    on_tensor(done, len(order))


def merge(name: str, weight: Tensor, lora: Lora, read: Callable[[Stored], Tensor]) -> Tensor:
    """The weight with a LoRA in it, W + scale B A: added up in float32, in the weight's format.

    Raises `CheckpointError` for a value that is not finite in it.
    """
    added = lora.scale * (read(lora.up).float() @ read(lora.down).float())
    merged = (weight.float() + added).to(weight.dtype)
    if not merged.isfinite().all():
        raise CheckpointError(
            f"with the LoRA {lora.up.path} at scale {lora.scale:g}, {name} holds values that are "
            f"not finite in {DTYPES[weight.dtype]}: choose a smaller --lora-alpha, or other files"
        )
    return merged
