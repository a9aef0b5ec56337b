"""Recognize the parts in checkpoint files, and which published model they are.

A part's role is told from its tensors. Several models have the same tensors, and so have the two
tiny autoencoders: which one a file is, follows from what `fetch` recorded (repository and
SHA-256), from tensors that one model alone has, or from the caller. A file's name is a hint, which
is offered and never followed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packforcing.checkpoints.fetch import FetchedFile, recorded_file
from packforcing.checkpoints.lora_names import is_lora
from packforcing.checkpoints.names import split_name, split_names
from packforcing.checkpoints.published import AUTOENCODER_PARTS, PARTS, PUBLISHED, published
from packforcing.checkpoints.reading import StoredTensor, Tensors, list_tensors
from packforcing.config import Config
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

# Files of the family that hold another model than those published to run, by words in their names
_RELATIVES = [
    (re.compile(pattern), what)
    for pattern, what in (
        (r"ar[_-]?diffusion", "a causal model before distillation, which needs many guided steps"),
        (r"ode[_-]?init|causal[_-]?(ode|cd)\b", "an initialization for distillation"),
        (r"bidirectional", "a model that is not causal"),
        (r"teacher|real[_-]?score", "a teacher, which needs many guided steps"),
        (r"critic|fake[_-]?score", "a critic, which training alone uses"),
    )
]

# Names that T5's and CLIP's encoders alone have: transformers', Wan's and llama.cpp's
_ENCODERS = [
    (re.compile(r"\.(SelfAttention|DenseReluDense)\.|\.pos_embedding\.embedding\.|^enc\.blk\."),
     "text encoder"),
    (re.compile(r"^(visual|vision_model|textual|text_model)\."), "image encoder"),
]  # fmt: skip

# Entries that training alone uses
_TRAINING_ONLY = re.compile(r"critic|discriminator|teacher|(fake|real)_?score")

# Tensors that other models of Wan have beside those of the text-to-video transformer
_OTHER_WANS = [
    (re.compile(pattern), what)
    for pattern, what in (
        (r"^vace_", "VACE"),
        (r"^(face_adapter|motion_encoder|pose_patch_embedding)", "Wan-Animate"),
        (r"^(casual_audio_encoder|audio_injector|audio_proj)", "a speech-to-video model"),
        (r"^(control_adapter|ref_conv)", "a Fun-Control model"),
        (r"^img_emb\.|_img\b", "an image-to-video model"),
    )
]


@dataclass(frozen=True)
class CheckpointPart:
    """The tensors of one entry of a file, by the names of Wan, TAEHV or diffusers' Wan VAE.

    A LoRA's are of all entries that hold one, by their names in the file.
    """

    path: Path
    entry: str  # "" where the file is not divided
    tensors: Tensors
    role: str  # "transformer", "autoencoder", "LoRA", "text encoder", "image encoder" or "other"
    vae: str = ""  # which autoencoder: "wan", or "taehv" for either of the tiny ones


def survey_file(path: Path) -> list[CheckpointPart]:
    """List the parts in a file and tell what they are for. No weight is read.

    Raises:
        CheckpointError: The file is damaged or unsafe.
    """
    entries: dict[str, list[tuple[str, StoredTensor]]] = {}
    listed = list_tensors(path)
    names = split_names(stored.name for stored in listed)
    for stored in listed:
        entry, name = names[stored.name]
        if (
            "." in name or math.prod(stored.shape) != 1
        ):  # else a trainer's counter: step, n_averaged
            entries.setdefault(entry, []).append((name, stored))
    parts, lora = [], Tensors()
    for entry, named in entries.items():
        if is_lora(stored.name for _, stored in named):
            lora |= {stored.name: stored for _, stored in named}
        else:
            parts.append(_survey_entry(path, entry, _join_names(named)))
    return parts + ([CheckpointPart(path, "", lora, "LoRA")] if lora else [])


def _join_names(named: list[tuple[str, StoredTensor]]) -> Tensors:
    """Return the tensors of an entry by name, each of which may stand once."""
    tensors: Tensors = {}
    for name, stored in named:
        if name in tensors:
            raise CheckpointError(
                f"{stored.path} holds {name} twice, as {tensors[name].name} and {stored.name}"
            )
        tensors[name] = stored
    return tensors


def _survey_entry(path: Path, entry: str, tensors: Tensors) -> CheckpointPart:
    """Tell what the tensors of an entry are for: what most of them belong to."""
    for pattern, role in _ENCODERS:
        if any(pattern.search(name) for name in tensors):
            return CheckpointPart(path, entry, tensors, role)
    known_names = weight_shapes(PAPER)
    for role, vae in (("transformer", ""), ("autoencoder", "taehv")):
        if 2 * sum(f"{role}.{name}" in known_names for name in tensors) > len(tensors):
            return CheckpointPart(path, entry, tensors, role, vae)
    if any(re.match(r"(en|de)coder\.\w|conv[12]\.|(post_)?quant_conv\.", name) for name in tensors):
        known_names = weight_shapes(with_autoencoder(PAPER, "wan"))
        renamed = _wan_vae_names(tensors)
        if 2 * sum(f"autoencoder.{name}" in known_names for name in renamed) > len(renamed):
            return CheckpointPart(path, entry, renamed, "autoencoder", "wan")
    return CheckpointPart(path, entry, tensors, "other")


def has_diffusers_name(stored: StoredTensor) -> bool:
    """Tell whether a tensor is named as in diffusers."""
    return ".attn1." in stored.name or ".mid_block." in stored.name


def describe_part(part: CheckpointPart) -> str:
    """Say what a part is, for a message."""
    if part.role == "other":
        names = ", ".join(sorted(part.tensors)[:3])
        return f"{len(part.tensors)} tensors of neither a transformer nor an autoencoder ({names})"
    return f"{'an' if part.role[0] in 'aei' else 'a'} {part.role}"


def _wan_vae_names(tensors: Tensors) -> Tensors:
    """Rename the tensors of Wan's VAE as diffusers does; others keep their names."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    try:
        renamed = convert_wan_vae_to_diffusers(dict(tensors))
    except (ValueError, IndexError, KeyError):  # it expects numbers where another has none
        return tensors
    for name, stored in tensors.items():
        if stored not in renamed.values():
            raise CheckpointError(f"{stored.path} holds {name} twice, under two names")
    return renamed


# Which model


class Records:
    """What `fetch` recorded of files. Each is hashed once, when it is first asked for."""

    def __init__(self) -> None:
        self._records: dict[Path, tuple[str, FetchedFile] | None] = {}

    def __getitem__(self, path: Path) -> tuple[str, FetchedFile] | None:
        """Return a file's path in its repository and its record, or None.

        Raises:
            CheckpointError: The file is not what was fetched.
        """
        if path not in self._records:
            self._records[path] = recorded_file(path)
        return self._records[path]

    def names(self, path: Path, rows: dict) -> list[str]:
        """List the published models or parts that a file is, by its repository and SHA-256."""
        if not (record := self[path]) or not record[1].revision:
            return []
        return [
            name
            for name, row in rows.items()
            if row.source == record[1].source and record[0] in row.files
        ]


def recognize_model(parts: Sequence[CheckpointPart], records: Records) -> tuple[str, str]:
    """Tell which published model the parts are.

    Returns:
        Its name in `PUBLISHED`, and the reason.

    Raises:
        CheckpointError: Several models have these tensors, and nothing recorded says which.
    """
    transformers = [part for part in parts if part.role == "transformer"]
    if any(
        f"transformer.{name}" in PACK_COMPRESSOR for one in transformers for name in one.tensors
    ):
        return "packforcing-unofficial", "it has a pack_compressor"
    paths = list(dict.fromkeys(part.path for part in transformers))
    for path in paths:
        kinds = records.names(path, PUBLISHED)
        if len(kinds) == 1:
            return kinds[0], f"fetched from {published(kinds[0]).source}"
    raise CheckpointError(
        f"{paths[0]} holds a Wan transformer, and several models have these tensors: name it with "
        f"--model{_hint(paths)}; known models: {', '.join(PUBLISHED)}"
    )


def relative_hint(path: Path) -> str:
    """Say what a file holds that its name puts beside the published models, "" for others."""
    name = "/".join(path.parts[-2:]).lower()
    return next((what for pattern, what in _RELATIVES if pattern.search(name)), "")


def _hint(paths: Sequence[Path]) -> str:
    """Say which model the files' names suggest, as the end of a sentence."""
    for path in paths:
        if what := relative_hint(path):
            return f" (the name {path.name} suggests {what}, which none of them is)"
        if kind := _suggested_model(path):
            return f" (the name {path.name} suggests {kind}: --model {kind})"
    return ""


def _suggested_model(path: Path) -> str:
    """Return the published model whose name or file is most like a path, "" for none."""

    def letters(text: str) -> str:
        return re.sub(r"[^a-z0-9+]", "", text.lower())

    name, best = letters("".join([*path.parts[-2:-1], path.stem])), ("", "")
    for kind, row in PUBLISHED.items():
        aliases = [letters(kind)]
        for file in row.files[:1]:
            stem = Path(file).with_suffix("")
            aliases += [letters("".join(stem.parts[-2:])), letters(stem.name)]
        for alias in aliases:
            generic = len(alias) < 6 or alias in ("emamodel", "diffusionpytorchmodel")
            if not generic and alias in name and len(alias) > len(best[1]):
                best = kind, alias
    return best[0]


def recognize_autoencoder(part: CheckpointPart, vae: str | None, records: Records) -> str:
    """Tell which autoencoder a part is.

    Args:
        part: A part with the role "autoencoder".
        vae: The caller's choice.
        records: What `fetch` recorded of files.

    Returns:
        Its name in `AUTOENCODERS`.

    Raises:
        CheckpointError: The tensors are not the caller's choice, or nothing tells the tiny ones
            apart.
    """
    candidates = ["wan"] if part.vae == "wan" else TINY_AUTOENCODERS
    if vae is not None:
        if vae not in candidates:
            raise CheckpointError(
                f"{part.path} is not '{vae}' by its tensors, but {' or '.join(candidates)}"
            )
        return vae
    if part.vae == "wan":
        return "wan"
    recorded = records.names(part.path, PARTS)
    for name in candidates:
        if AUTOENCODER_PARTS[name] in recorded:
            return name
    similar = [name for name in candidates if AUTOENCODER_PARTS[name] in part.path.name]
    likely = max(similar, key=lambda name: len(AUTOENCODER_PARTS[name]), default="")
    hint = f" (the name suggests {AUTOENCODER_PARTS[likely]}: --vae {likely})" if likely else ""
    raise CheckpointError(
        f"{part.path} is a tiny autoencoder, and its tensors do not say which: name it with "
        f"--vae, taehv (taew2_1) or lighttae (lighttaew2_1){hint}"
    )


def describe_other_wan(tensors: Tensors, config: Config) -> str:
    """Say which model of Wan a transformer is if it is not of `config`'s size and inputs.

    Args:
        tensors: By Wan's names.
        config: What it should be.

    Returns:
        The end of "the file holds", "" if the sizes are those of `config`.
    """
    for pattern, what in _OTHER_WANS:
        if any(pattern.search(name) for name in tensors):
            return what
    embedding = tensors.get("patch_embedding.weight")
    if embedding is None or len(embedding.shape) != 5:
        return ""
    width, channels = embedding.shape[:2]
    numbers = [
        int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,3})\.", name))
    ]
    layers = 1 + max(numbers, default=0)
    if channels == 36 != config.latent_channels:
        return f"an image-to-video model ({channels} input channels, width {width})"
    if channels != config.latent_channels:
        size = "Wan2.2 5B, " if (width, channels) == (3072, 48) else ""
        return f"{size}a model of {channels} latent channels, width {width}"
    if width != config.dim:
        size = "a 14B model, " if (width, layers) == (5120, 40) else ""
        return f"{size}a model of {layers} layers of width {width}"
    return ""


def describe_other_autoencoder(tensors: Tensors, config: Config) -> str:
    """Say which autoencoder it is if it has other latents than `config`, as `describe_other_wan`.

    Args:
        tensors: By TAEHV's or diffusers' names.
        config: What it should be.
    """
    stored = tensors.get("post_quant_conv.weight") or tensors.get("decoder.1.weight")
    channels = stored.shape[1] if stored and len(stored.shape) > 3 else config.latent_channels
    if channels == config.latent_channels:
        return ""
    return f"an autoencoder of {channels} latent channels{' (Wan2.2)' if channels == 48 else ''}"


# Which entry


def select_transformer(
    parts: Sequence[CheckpointPart], kind: str, entry: str | None
) -> CheckpointPart:
    """Select the transformer of a file that is used.

    Args:
        parts: The transformers in one file.
        kind: The model's name in `PUBLISHED`.
        entry: Instead of the one that models of this kind are run with.

    Raises:
        CheckpointError: The file has no such entry, or several.
    """
    by_entry, name = {part.entry: part for part in parts}, entry or published(kind).entry
    if (key := split_name(f"{name}.blocks.0")[0] if entry else name) in by_entry:
        return by_entry[key]
    if not entry and [one for one in by_entry if not _TRAINING_ONLY.search(one)] == [""]:
        return by_entry[""]
    path = parts[0].path
    available = ", ".join(f"'{entry or 'model'}'" for entry in by_entry)
    if not name:
        raise CheckpointError(
            f"{path} is divided into {available}, which {kind} is not: name another --model"
        )
    raise CheckpointError(
        f"{path} has no entry '{name}', which {kind} is run with, but {available}: choose an "
        "entry with --entry, or another --model"
    )


def select_autoencoder(parts: Sequence[CheckpointPart]) -> CheckpointPart | None:
    """Select the autoencoder that is used: one in a file of its own before one in a model's file.

    Args:
        parts: All parts of all files.

    Raises:
        CheckpointError: There are two.
    """
    models = {part.path for part in parts if part.role == "transformer"}
    autoencoders = [part for part in parts if part.role == "autoencoder"]
    alone = [part for part in autoencoders if part.path not in models]
    candidates = alone or autoencoders
    if len(candidates) > 1:
        raise CheckpointError(
            f"{' and '.join(str(part.path) for part in candidates)} are two autoencoders: name one"
        )
    return candidates[0] if candidates else None
