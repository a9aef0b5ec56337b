"""Normalize tensors' names: without the wrappers that frameworks add, from diffusers' to Wan's.

Everything that reads names of Wan's transformer goes through `split_name`: checkpoints and LoRAs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Components that wrap modules anywhere in a name: torch.compile, FSDP, DDP, activation checkpoints,
# Lightning
_WRAPPING = re.compile(r"module|_orig_mod|_\w*module")

# Leading components that say nothing about which weights these are: attributes and dictionaries of
# trainers and pipelines, PEFT, ComfyUI
_NEUTRAL = {
    "app", "backbone", "base_model", "checkpoint", "denoiser", "diffusion_model", "dit",
    "inner_model", "model", "model_state_dict", "net", "network", "params", "pipe", "pipeline",
    "sd", "state_dict", "transformer", "unet", "wan", "wan_model", "weights", "wrapped_model",
}  # fmt: skip

# First components of the names that models themselves give: Wan's transformer in Wan's and
# diffusers' names, other models of Wan, autoencoders, UMT5
_ROOTS = {
    "blocks", "condition_embedder", "control_adapter", "face_adapter", "head", "img_emb",
    "motion_encoder", "pack_compressor", "patch_embedding", "proj_out", "scale_shift_table",
    "text_embedding", "time_embedding", "time_projection", "vace_blocks", "vace_patch_embedding",
    "conv1", "conv2", "decoder", "encoder", "post_quant_conv", "quant_conv",
    "shared", "token_embedding",
}  # fmt: skip

# diffusers' names to Wan's; diffusers: scripts/convert_wan_to_diffusers.py goes the other way
_DIFFUSERS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^condition_embedder\.text_embedder\.linear_1\b", "text_embedding.0"),
        (r"^condition_embedder\.text_embedder\.linear_2\b", "text_embedding.2"),
        (r"^condition_embedder\.time_embedder\.linear_1\b", "time_embedding.0"),
        (r"^condition_embedder\.time_embedder\.linear_2\b", "time_embedding.2"),
        (r"^condition_embedder\.time_proj\b", "time_projection.1"),
        (r"^condition_embedder\.image_embedder\b", "img_emb"),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\b", "head.head"),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"_attn\.to_out\.0\b", "_attn.o"),
        (r"_attn\.to_([qkv])\b", r"_attn.\1"),
        (r"_attn\.add_([kv])_proj\b", r"_attn.\1_img"),
        (r"_attn\.norm_added_k\b", "_attn.norm_k_img"),
        (r"^(blocks\.\d+)\.norm2\b", r"\1.norm3"),
        (r"\.ffn\.net\.0\.proj\b", ".ffn.0"),
        (r"\.ffn\.net\.2\b", ".ffn.2"),
    )
]

_WAN = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^text_embedding\.0\b", "condition_embedder.text_embedder.linear_1"),
        (r"^text_embedding\.2\b", "condition_embedder.text_embedder.linear_2"),
        (r"^time_embedding\.0\b", "condition_embedder.time_embedder.linear_1"),
        (r"^time_embedding\.2\b", "condition_embedder.time_embedder.linear_2"),
        (r"^time_projection\.1\b", "condition_embedder.time_proj"),
        (r"^head\.modulation$", "scale_shift_table"),
        (r"^head\.head\b", "proj_out"),
        (r"\.modulation$", ".scale_shift_table"),
        (r"\.norm3\b", ".norm2"),
        (r"_attn\.([qkv])\b", r"_attn.to_\1"),
        (r"_attn\.o\b", "_attn.to_out.0"),
        (r"\.self_attn\b", ".attn1"),
        (r"\.cross_attn\b", ".attn2"),
        (r"\.ffn\.0\b", ".ffn.net.0.proj"),
        (r"\.ffn\.2\b", ".ffn.net.2"),
    )
]


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor's name into the entry that it belongs to and Wan's name for it.

    Args:
        name: As in a file; the keys of nested dictionaries come first, joined with dots.

    Returns:
        The entry, which tells several sets of weights in one file apart ("generator_ema",
        "critic", "first_stage_model"), "" for none; and the name without wrappers, from diffusers'
        names. A name that is not of Wan's transformer only loses its wrappers.
    """
    components, root = _components(name)
    if root is None:
        root = next((i for i, part in enumerate(components) if part not in _NEUTRAL), 0)
    return _split(name, components, root)


def split_names(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Split all names of a file, as `split_name` does one.

    A name that no known model gives is put into the entry whose names begin like it, so that an
    unknown tensor among a model's is not taken for one beside it.
    """
    parts = {name: _components(name) for name in names}
    prefixes = {tuple(parts[:root]) for parts, root in parts.values() if root is not None}
    result = {}
    for name, (components, root) in parts.items():
        if root is None and prefixes:
            lengths = [n for n in range(len(components)) if tuple(components[:n]) in prefixes]
            root = max(lengths) if lengths else len(components) - 1
        result[name] = split_name(name) if root is None else _split(name, components, root)
    return result


def _components(name: str) -> tuple[list[str], int | None]:
    """Return a name's components without wrappers, and where the model's own name begins."""
    components = [part for part in name.split(".") if not _WRAPPING.fullmatch(part)]
    return components, next((i for i, part in enumerate(components) if part in _ROOTS), None)


def _split(name: str, components: list[str], root: int) -> tuple[str, str]:
    entry = ".".join(part for part in components[:root] if part not in _NEUTRAL)
    return entry, _from_diffusers(".".join(components[root:]) or name)


def unwrapped_name(name: str) -> str:
    """Return a tensor's name without what wraps it and without its entry, not translated."""
    components, root = _components(name)
    if root is None:
        root = next((i for i, part in enumerate(components) if part not in _NEUTRAL), 0)
    return ".".join(components[root:]) or name


def wan_name(name: str) -> str:
    """Translate a tensor's name to Wan's: without wrappers, from diffusers' names."""
    return split_name(name)[1]


def diffusers_name(name: str) -> str:
    """Translate Wan's name of a parameter of its text-to-video transformer to diffusers'."""
    for pattern, replacement in _WAN:
        name = pattern.sub(replacement, name)
    return name


def _from_diffusers(name: str) -> str:
    for pattern, replacement in _DIFFUSERS:
        name = pattern.sub(replacement, name)
    return name
