"""Recognize checkpoint files: for which part of a model they are, and of which model.

A file's part is told from its contents: its container, the entries of a torch checkpoint that hold
tensors, and whether these are a transformer's, an autoencoder's or a LoRA's. Several models have
the same tensor names and shapes, and so have the two tiny autoencoders. Between these, the name
under which a file is published decides, or the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packforcing.checkpoints.lora import LONGLIVE_ENTRY, LORA_NAME
from packforcing.checkpoints.names import wan_name
from packforcing.checkpoints.published import AUTOENCODER_PARTS, PUBLISHED, published
from packforcing.checkpoints.reading import StoredTensor, Tensors, list_tensors
from packforcing.errors import CheckpointError
from packforcing.model import weight_shapes
from packforcing.presets import PAPER, TINY_AUTOENCODERS, with_autoencoder

# The unofficial PackForcing's compressor makes 273 tokens per block, which every layer projects.
# It fits neither the paper's compressor nor its mid pass: the low branch is used alone instead.
PACK_COMPRESSOR = [
    f"transformer.pack_compressor.net.{layer}.{kind}"
    for layer in (0, 2, 4, 6)
    for kind in ("weight", "bias")
]


@dataclass(frozen=True)
class CheckpointFile:
    """The tensors of a file, by the names of Wan, TAEHV or diffusers' AutoencoderKLWan."""

    path: Path
    entries: dict[str, Tensors]
    role: str  # "transformer", "autoencoder" or "LoRA"
    vae: str = ""  # which autoencoder: "wan", or "taehv" for either of the tiny ones


def survey_file(path: Path) -> CheckpointFile:
    """List the tensors of a file and tell what they are for. No weight is read.

    Raises:
        CheckpointError: The file is damaged, unsafe, or not for any part of a model.
    """
    entries: dict[str, Tensors] = {}
    for stored in list_tensors(path):
        tensors, name = entries.setdefault(stored.entry, {}), wan_name(stored.name)
        if name in tensors:
            raise CheckpointError(
                f"{path} holds {name} twice, as {tensors[name].name} and {stored.name}"
            )
        tensors[name] = stored
    names = {name for tensors in entries.values() for name in tensors}
    if any(LORA_NAME.match(name) for name in names):
        return CheckpointFile(path, entries, "LoRA")
    known_names = weight_shapes(PAPER)
    for role, vae in (("transformer", ""), ("autoencoder", "taehv")):
        if 2 * sum(f"{role}.{name}" in known_names for name in names) > len(names):
            return CheckpointFile(path, entries, role, vae)
    known_names = weight_shapes(with_autoencoder(PAPER, "wan"))
    renamed = {entry: _wan_vae_names(tensors) for entry, tensors in entries.items()}
    vae_names = [name for tensors in renamed.values() for name in tensors]
    if 2 * sum(f"autoencoder.{name}" in known_names for name in vae_names) > len(vae_names):
        return CheckpointFile(path, renamed, "autoencoder", "wan")
    raise CheckpointError(
        f"{path} holds neither a Wan transformer, nor a LoRA for one, nor an autoencoder, but "
        f"{len(names)} other tensors: {', '.join(sorted(names)[:3])}, ..."
    )


def has_diffusers_name(stored: StoredTensor) -> bool:
    """Tell whether a tensor is named as in diffusers."""
    return ".attn1." in stored.name or ".mid_block." in stored.name


def _wan_vae_names(tensors: Tensors) -> Tensors:
    """Rename the tensors of Wan's VAE as diffusers does; others keep their names."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    try:
        renamed = convert_wan_vae_to_diffusers(tensors)
    except (ValueError, IndexError):  # it expects numbers where another model's names have none
        return tensors
    for name, stored in tensors.items():
        if stored not in renamed.values():
            raise CheckpointError(f"{stored.path} holds {name} twice, under two names")
    return renamed


def recognize_model(files: list[CheckpointFile]) -> tuple[str, str]:
    """Tell which published model a set of files is.

    Returns:
        Its name in `PUBLISHED`, and the reason.

    Raises:
        CheckpointError: Several models fit.
    """
    models = [file for file in files if file.role == "transformer"]
    names = {name for file in models for tensors in file.entries.values() for name in tensors}
    if any(f"transformer.{name}" in PACK_COMPRESSOR for name in names):
        return "packforcing-unofficial", "it has a pack_compressor"
    if any(LONGLIVE_ENTRY in file.entries for file in files):
        return "longlive", f"its LoRA is a '{LONGLIVE_ENTRY}'"
    kinds = {kind: row for kind, row in PUBLISHED.items() if row.entry}
    for kind, row in kinds.items():
        for name in row.files[:1]:
            path = name.removeprefix("checkpoints/").removeprefix("models/")
            if any(file.path.absolute().match(path) for file in models):
                return kind, f"it is published as {path}"
    undivided = [stored.name for file in models for stored in file.entries.get("", {}).values()]
    if undivided and not any(name.startswith("model.") for name in undivided):
        return "wan2.1-t2v-1.3b", "its tensors are not divided into entries and have no prefix"
    raise CheckpointError(
        f"{models[0].path} holds a causal Wan model, and several models have these tensors: name "
        f"it with --model, one of {', '.join(kinds)}"
    )


def recognize_autoencoder(files: list[CheckpointFile], vae: str | None) -> str:
    """Tell which autoencoder the files hold.

    Args:
        files: Files with the role "autoencoder", at least one.
        vae: The caller's choice, instead of the file's name.

    Returns:
        Its name in `AUTOENCODERS`.

    Raises:
        CheckpointError: There are two, or nothing tells the tiny ones apart.
    """
    layouts = {file.vae for file in files}
    if len(layouts) > 1:
        raise CheckpointError(
            f"{' and '.join(str(file.path) for file in files)} are two autoencoders: name one"
        )
    (layout,) = layouts
    candidates = ["wan"] if layout == "wan" else TINY_AUTOENCODERS
    if vae is not None:
        if vae not in candidates:
            raise CheckpointError(
                f"{files[0].path} is not '{vae}' by its tensors, but {' or '.join(candidates)}"
            )
        return vae
    if layout == "wan":
        return layout
    file_name = files[0].path.name
    named = [name for name in candidates if AUTOENCODER_PARTS[name] in file_name]
    if named:  # lighttaew2_1 contains taew2_1
        return max(named, key=lambda name: len(AUTOENCODER_PARTS[name]))
    raise CheckpointError(
        f"{files[0].path} is a tiny autoencoder, and its tensors do not say which: name it with "
        "--vae, taehv (taew2_1) or lighttae (lighttaew2_1)"
    )


def select_entry(file: CheckpointFile, kind: str, entry: str | None) -> Tensors:
    """Select the tensors of a file that are used.

    Args:
        file: The file.
        kind: The model's name in `PUBLISHED`.
        entry: Of a transformer's torch checkpoint, instead of the one its kind is run with.

    Raises:
        CheckpointError: The file has no such entry, or several.
    """
    entries, name = file.entries, ""
    if file.role == "transformer":
        name = entry or published(kind).entry
    elif file.role == "LoRA":
        entries = {e: t for e, t in entries.items() if any(LORA_NAME.match(key) for key in t)}
        name = LONGLIVE_ENTRY  # its critic's LoRA is there as well
    if name in entries:
        return entries[name]
    if len(entries) == 1 and (file.role != "transformer" or (not entry and "" in entries)):
        return next(iter(entries.values()))
    available = ", ".join(f"'{entry}'" for entry in entries if entry) or "no entries"
    if not name:
        raise CheckpointError(
            f"{file.path} is divided into {available}, which {kind} is not: name another --model"
        )
    raise CheckpointError(
        f"{file.path} has no entry '{name}', which {kind} is run with, but {available}: choose an "
        "entry with --entry, or another --model"
    )
